"""What is learnt: heads, targets, losses and scores."""
