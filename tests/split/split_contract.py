"""What every split promises, as tests that each model's subclass inherits."""

import pytest
from zoo.proof import call, gradients, loss, prove_gradients, prove_merge, prove_outputs, recycle

from pipeline.split.tree import as_call

__all__ = ["SplitContract", "call", "gradients", "loss", "recycle"]


class SplitContract:
    """Subclasses give a `model` and an `example` of two sizes; every one of the `cuts` must then be exact."""

    cuts = (0, 0.25, 0.5, 0.75, 1)

    def model(self):
        raise NotImplementedError

    def example(self, size):
        raise NotImplementedError

    @pytest.mark.parametrize("size", [2, 3])
    def test_output_is_the_full_model_s(self, case, size):
        prove_outputs(case.model, case.prefix, case.suffix, self.example(size))

    @pytest.mark.parametrize("training", [False, True])
    def test_gradients_and_running_statistics_are_the_full_model_s(self, case, training):
        prove_gradients(case.model, case.prefix, case.suffix, case.example, training=training)

    def test_state_has_the_batch_axis_first_and_fits_the_spec(self, case):
        args, kwargs = as_call(self.example(3))
        state = case.prefix(*args, **kwargs)
        assert state.keys() == case.prefix.spec.keys() == case.suffix.spec.keys()
        for name, tensor in state.items():
            assert tensor.shape == (3, *case.prefix.spec[name].shape)
            assert tensor.dtype == case.prefix.spec[name].dtype

    def test_only_what_trains_has_a_name(self, case):
        names = {name for name, _ in case.suffix.named_parameters()}
        assert names <= {name for name, _ in case.model.named_parameters()}
        assert names.isdisjoint(case.prefix.weights())
        assert case.suffix.state_dict().keys() <= case.model.state_dict().keys()
        assert case.suffix.state_dict().keys().isdisjoint(case.prefix.weights())

    def test_trained_suffix_merges_into_the_full_model(self, case):
        prove_merge(case.model, case.prefix, case.suffix, case.example)
