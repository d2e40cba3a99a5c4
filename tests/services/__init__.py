"""Real services on loopback, one module each; a test that asks for one is skipped where its package is absent."""
