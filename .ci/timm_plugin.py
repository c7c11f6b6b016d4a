"""pytest plugin for timm's tests/test_models.py: adds our models, and stops if any of them would hardly be tested."""

from collections import defaultdict

import pytest
from timm.models import _registry

import sgconvnext  # noqa: F401  registers our models

MODELS = ["sgconvnext_atto", "sgconvnext_atto_gap3", "sgconvnext_atto_gated", "convnext_atto_gated"]
MODELS += ["sgconvnext_tiny", "sgconvnext_tiny_gap3"]
MIN_TESTS = 10  # per model; timm 1.0.31 has 11
REQUIRED_TESTS = {"test_model_forward_intermediates", "test_model_forward_torchscript", "test_model_forward_fx"}

# timm picks the models of its intermediate-feature tests by module, and our modules are not on its list.
for module in ("sgconvnext", "gated_convnext"):
    _registry._module_to_models["convnext"] |= _registry._module_to_models[module]


def pytest_collection_finish(session: pytest.Session) -> None:
    tests = defaultdict(set)
    for item in session.items:
        if isinstance(item, pytest.Function) and hasattr(item, "callspec"):
            tests[item.callspec.params.get("model_name")].add(item.originalname)
    for model in MODELS:
        missing = sorted(REQUIRED_TESTS - tests[model])
        if missing or len(tests[model]) < MIN_TESTS:
            raise pytest.UsageError(
                f"{model}: timm has {len(tests[model])} tests for it, expected {MIN_TESTS} or more; missing: {missing}"
            )
