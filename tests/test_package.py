"""The ground: imports, names, the environment files."""

import subprocess
import sys
import tomllib

import pytest
from conftest import HERE

import grokscope as gs

ROOT = HERE.parent


def test_import_is_light():
    code = (
        "import sys, grokscope; heavy = {'jax', 'haiku', 'numpy', 'pandas', 'matplotlib', 'ipywidgets'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names():
    for name in gs.__all__:
        assert getattr(gs, name) is not None
    assert set(gs.__all__) == set(dir(gs))
    with pytest.raises(AttributeError, match="no attribute 'loads'"):
        _ = gs.loads


def test_names_of_an_extra_that_is_not_installed(monkeypatch):
    """They are not shown, so that help() gets through, and asked for they say what to install."""
    monkeypatch.setitem(sys.modules, "cloudpickle", None)
    monkeypatch.delitem(sys.modules, "grokscope.notebook.cluster", raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"gs.cluster needs cloudpickle: pip install -e"):
        _ = gs.cluster
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert set(gs.__all__) - set(dir(gs)) == {"Cluster", "ClusterError", "cluster"}


def test_versions_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == gs.__version__


def test_every_tap_is_met_once():
    """The table and the network name the same taps; each is called once in a pass."""
    import jax
    import jax.numpy as jnp
    from conftest import small_config

    from grokscope.model import transformer
    from grokscope.model.taps import observed

    class Everything:
        def __init__(self):
            self.seen = []

        def wants(self, name):
            return True

        def __call__(self, name, value):
            self.seen.append(name)
            return value

    config = small_config()
    ends, layers = transformer.initial_params(config, jax.random.key(0))
    everything = Everything()
    with observed(everything):
        x = transformer.embed(config, ends, jnp.zeros((1, 3), jnp.int32))
        positions = transformer.Positions.of(config, jnp.zeros(1, jnp.int32), 3)
        x = transformer.layer(config, layers[0], x, None, positions, jnp.ones((1, 3), bool))[0]
        transformer.unembed(config, ends, x)
    assert sorted(everything.seen) == sorted(gs.TAPS)


def test_initialisers():
    """Fresh weights as mini-model.md found them stable: unit-scale stream, matrices 1/sqrt(fan in), post-norms 1/sqrt(2L)."""
    import jax
    import numpy as np
    from conftest import small_config

    from grokscope.model import transformer

    config = small_config(emb_size=256, vocab_size=2000, num_layers=2)
    ends, layers = transformer.initial_params(config, jax.random.key(0))
    assert np.std(ends["embedding"]["w"]) == pytest.approx(1 / 16, rel=0.05)
    layer = layers[1]
    for module, name, fan_in in (
        ("layer/attention", "query", 256),
        ("layer/experts", "down", config.ffn_size),
        ("layer/router", "w", 256),
    ):
        assert np.std(layer[module][name]) == pytest.approx(fan_in**-0.5, rel=0.1)
    assert np.all(layer["layer/post_moe_norm"]["scale"] == np.float32(0.5))
    assert np.all(layer["layer/pre_moe_norm"]["scale"] == 1)
    assert not np.array_equal(layers[0]["layer/router"]["w"], layer["layer/router"]["w"])


def test_environment_yml_installs_this_project():
    """conda brings python and pip, the rest comes through pyproject; every conda spec parses."""
    yaml = pytest.importorskip("yaml")
    rattler = pytest.importorskip("rattler")
    document = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert set(document) == {"name", "channels", "dependencies"}
    specs = [d for d in document["dependencies"] if isinstance(d, str)]
    (pip,) = (d["pip"] for d in document["dependencies"] if isinstance(d, dict))
    assert pip == ["-e ."]
    names = {rattler.MatchSpec(spec, strict=True).name.normalized for spec in specs}
    assert names == {"python", "pip"}


def test_requirements_parse():
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    everything = project["dependencies"] + sum(project["optional-dependencies"].values(), [])
    assert {Requirement(r).name for r in everything} >= {"jax", "dm-haiku", "sentencepiece", "jupyterlab"}
