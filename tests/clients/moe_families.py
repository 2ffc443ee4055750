# SPDX-License-Identifier: BSD-3-Clause
"""transformers' common tests of models, on tiny models of MoE families. transformers_suite.py copies this file beside
them and runs it with EXPERTS: the experts implementation of models whose config names none, or "whole_layers", which
accelerates every model as it is built or loaded."""

import os
import unittest

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedModel, set_seed

from switchgear import accelerate
from tiny_configs import tiny_config

from .test_modeling_common import ModelTesterMixin
from .test_training_mixin import TrainingTesterMixin

FAMILIES = os.environ["FAMILIES"].split()
WHOLE_LAYERS = os.environ["EXPERTS"] == "whole_layers"
EXPERTS = "switchgear" if WHOLE_LAYERS else os.environ["EXPERTS"]
HEADS = ("", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")

of_request = PreTrainedModel.get_correct_experts_implementation
PreTrainedModel.get_correct_experts_implementation = lambda self, requested: of_request(self, requested or EXPERTS)


def accelerate_models() -> None:
    post_init, from_pretrained = PreTrainedModel.post_init, PreTrainedModel.from_pretrained.__func__

    def accelerate_built(self: PreTrainedModel) -> None:
        post_init(self)
        if not any(parameter.is_meta for parameter in self.parameters()):
            accelerate(self, whole_layers=True, linears=True)

    def accelerate_loaded(cls: type, *args: object, **kwargs: object) -> object:
        loaded = from_pretrained(cls, *args, **kwargs)
        accelerate(loaded[0] if isinstance(loaded, tuple) else loaded, whole_layers=True, linears=True)
        return loaded

    PreTrainedModel.post_init = accelerate_built
    PreTrainedModel.from_pretrained = classmethod(accelerate_loaded)


if WHOLE_LAYERS:
    accelerate_models()


class ModelTester:
    """What the common tests know of a model: its config, its sizes and inputs."""

    is_training = True
    batch_size, seq_length = 3, 12

    def __init__(self, model_type: str) -> None:
        config = self.config = tiny_config(CONFIG_MAPPING[model_type])
        self.num_hidden_layers, self.num_attention_heads = config.num_hidden_layers, config.num_attention_heads
        self.hidden_size, self.vocab_size = config.hidden_size, config.vocab_size
        classes = {
            head: getattr(transformers, f"AutoModel{head}")._model_mapping.get(type(config), None) for head in HEADS
        }
        self.all_model_classes = tuple(filter(None, classes.values()))
        self.base_model_class, self.causal_lm_class = classes[""], classes["ForCausalLM"]

    def get_config(self) -> transformers.PretrainedConfig:
        return type(self.config).from_dict(self.config.to_dict())

    def prepare_config_and_inputs_for_common(self) -> tuple[transformers.PretrainedConfig, dict[str, torch.Tensor]]:
        ids = torch.randint(3, self.vocab_size, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class Family(ModelTesterMixin, TrainingTesterMixin):
    model_type: str
    test_all_params_have_gradient = False  # an expert may have no token
    # About transformers' own files of tests: their sizes, and the mixins that they use.
    test_num_layers_is_small = test_generation_tester_mixin_inheritance = None
    model_tester = property(lambda self: self._tester)

    def setUp(self) -> None:
        set_seed(0)
        self._tester = ModelTester(self.model_type)
        self.all_model_classes = self._tester.all_model_classes

    def test_experts_implementation(self) -> None:
        config = self.model_tester.get_config()
        for model_class in self.all_model_classes:
            assert model_class(config).config._experts_implementation == EXPERTS


for model_type in FAMILIES:
    globals()[model_type] = type(model_type, (Family, unittest.TestCase), {"model_type": model_type})


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
