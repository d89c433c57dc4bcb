"""The released layout: what is written verifies, and every fault is named with its file."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import small_config, write_random

import grokscope as gs
from grokscope.checkpoint import ckpt0, tensorfile, weights
from grokscope.checkpoint.tensorfile import Tensor, TensorFileError
from grokscope.model import quant


@pytest.fixture
def checkpoint(random_checkpoint, tmp_path):
    return shutil.copytree(random_checkpoint, tmp_path / "copy")


def fault(directory, *words):
    report = gs.verify(directory)
    assert not report.ok
    found = [p for p in report.problems if all(w in p for w in words)]
    assert found, report.problems
    return report


def swap(directory, a, b):
    a, b = (directory / "ckpt-0" / f"tensor{i:05d}_000" for i in (a, b))
    a_bytes = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(a_bytes)


def test_layers_lie_in_lexicographic_order():
    """Indices of grok-1.md: layer 10 begins at 26, layer 2 at 146, layer 63 at 722; 769 is the router of layer 9."""
    slots = ckpt0.slots(gs.GROK_1)
    first = {s.layer: s.index for s in reversed(slots)}
    assert (first[0], first[1], first[10], first[2], first[63]) == (2, 14, 26, 146, 722)
    assert (len(slots), slots[769].path) == (770, "decoder_layer_9/router/w")
    total = sum(ckpt0.RELEASED_SIZES[s.param.path] for s in slots)
    assert total == 318_239_886_140


def test_what_is_written_verifies(random_checkpoint):
    report = gs.verify(random_checkpoint)
    assert report.ok, report.problems
    assert report.num_files == len(ckpt0.slots(report.checkpoint.config))
    assert "SHA256SUMS compared" in report.notes[0]


def test_sums_as_find_writes_them(checkpoint):
    sums = checkpoint / "SHA256SUMS"
    sums.write_text(sums.read_text().replace("  ", "  ./"))
    assert gs.verify(checkpoint).ok


def test_bundled_model_verifies():
    from grokscope.run.engine import bundled_checkpoint

    assert gs.verify(bundled_checkpoint()).ok


def test_missing_truncated_foreign(checkpoint):
    tensors = checkpoint / "ckpt-0"
    (tensors / "tensor00003_000").unlink()
    fault(checkpoint, "tensor00003_000", "missing")
    whole = (tensors / "tensor00005_000").read_bytes()
    (tensors / "tensor00005_000").write_bytes(whole[:-100])
    fault(checkpoint, "tensor00005_000", "decoder_layer_0/multi_head_attention/key/w", "at byte")
    (tensors / "tensor00006_000").write_bytes(b"<html>not found</html>")
    fault(checkpoint, "tensor00006_000", "protocol 4")
    (tensors / "notes.txt").write_text("x")
    report = fault(checkpoint, "notes.txt", "not a file of this checkpoint")
    assert len({p.split(" ")[0] for p in report.problems} & {f"tensor0000{i}_000" for i in (3, 5, 6)}) == 3


def test_loading_names_the_file_too(checkpoint):
    path = checkpoint / "ckpt-0" / "tensor00008_000"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(TensorFileError, match="tensor00008_000"):
        gs.load(checkpoint)
    path.unlink()
    with pytest.raises(
        FileNotFoundError, match=r"tensor00008_000 \(decoder_layer_0/multi_head_attention/value/w\) is missing"
    ):
        gs.load(checkpoint)


def test_a_config_of_fewer_layers_is_refused(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    text = json.dumps(config | {"num_layers": config["num_layers"] - 1})
    (checkpoint / "config.json").write_text("\ufeff" + text, "utf-8")  # as some editors begin a text
    with pytest.raises(
        ValueError, match=r"config.json says 2 layers, which are 26 tensor files, and there is tensor00026"
    ):
        gs.load(checkpoint)


def test_sums_that_are_no_text(checkpoint):
    (checkpoint / "SHA256SUMS").write_bytes(b"\xff\xfe")
    assert "SHA256SUMS: line 1 is not a sum and a file name" in gs.verify(checkpoint).problems


def test_swaps_of_different_shape_are_seen(checkpoint):
    swap(checkpoint, 5, 7)  # key and query
    (checkpoint / "SHA256SUMS").unlink()
    fault(checkpoint, "tensor00005_000", "multi_head_attention/query/w", "swapped?")
    with pytest.raises(TensorFileError, match="swapped"):
        gs.load(checkpoint)


def test_swaps_of_equal_shape_need_sums(checkpoint):
    swap(checkpoint, 5, 8)  # key and value
    report = fault(checkpoint, "tensor00005_000", "changed or swapped")
    assert len(report.problems) == 2
    assert not report.notes
    sums = checkpoint / "SHA256SUMS"
    sums.write_text("".join(line for line in sums.read_text().splitlines(True) if "tensor00005_000" not in line) + "\n")
    fault(checkpoint, "tensor00005_000", "not listed in SHA256SUMS")
    fault(checkpoint, "SHA256SUMS", "is not a sum and a file name")
    sums.unlink()
    report = gs.verify(checkpoint)
    assert report.ok
    assert "cannot be seen" in report.notes[0]


def test_values_that_are_not_finite(checkpoint):
    config = gs.GrokConfig.read(checkpoint / "config.json")
    spoilt = {"tensor00000_000": (config.vocab_size, config.emb_size), "tensor00001_000": (config.emb_size,)}
    for file, shape in spoilt.items():
        path = checkpoint / "ckpt-0" / file
        before = path.read_bytes()
        tensorfile.write(path, Tensor(np.full(shape, np.inf, np.float32)))
        fault(checkpoint, file, "not finite")
        with pytest.raises(ValueError, match=rf"{file} .* not finite; .*verify"):
            gs.load(checkpoint)
        path.write_bytes(before)
    experts = next(slot for slot in ckpt0.slots(config) if slot.param.dims[0] == "E")
    tensor = ckpt0.open_checkpoint(checkpoint).read(experts)
    scales = np.array(tensor.scales)
    scales[1, 0, 3] = np.nan
    tensorfile.write(checkpoint / "ckpt-0" / experts.file, Tensor(np.array(tensor.weight), scales))
    fault(checkpoint, experts.file, "not finite")
    for form in ("int8", "expanded", "streamed"):
        with pytest.raises(ValueError, match=rf"{experts.file} \(.*not finite"):
            gs.load(checkpoint, weights=form).trace(range(5, 60))


def test_only_the_770_files_are_grok_1(tmp_path):
    for slot in ckpt0.slots(gs.GROK_1):
        (tmp_path / slot.file).write_bytes(b"x")
    found = ckpt0.open_checkpoint(tmp_path)
    assert found.config == gs.GROK_1
    assert len(gs.verify(tmp_path).problems) == 770
    (tmp_path / "tensor00769_000").unlink()
    with pytest.raises(FileNotFoundError, match=r"769 tensor files \(Grok-1 has 770\)"):
        ckpt0.open_checkpoint(tmp_path)


def test_folders_that_are_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a directory"):
        gs.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        gs.load(tmp_path)
    (tmp_path / "config.json").write_text('{"vocab_size": 5, "layers": 3}')
    with pytest.raises(ValueError, match=r"unknown keys \['layers'\], missing keys"):
        gs.load(tmp_path)


def test_the_folder_of_the_files_itself(random_checkpoint):
    assert ckpt0.open_checkpoint(random_checkpoint / "ckpt-0").config == ckpt0.open_checkpoint(random_checkpoint).config


def test_a_model_outlives_its_files(checkpoint):
    with gs.load(checkpoint) as grok:
        name = ckpt0.open_checkpoint(checkpoint).hash()
        shutil.rmtree(checkpoint)
        assert grok.generate([5, 6], max_new_tokens=2).meta["checkpoint"]["hash"] == name


def test_a_folder_where_a_file_should_be(checkpoint):
    (checkpoint / "ckpt-0" / "tensor00003_000").unlink()
    (checkpoint / "ckpt-0" / "tensor00003_000").mkdir()
    fault(checkpoint, "tensor00003_000", "not a file")


def test_a_tokenizer_that_is_none(checkpoint):
    (checkpoint / "tokenizer.model").write_text("<!DOCTYPE html>")
    (problem,) = ckpt0.verify(checkpoint).problems
    assert "tokenizer.model is not a SentencePiece model" in problem


def test_ctrl_c_at_the_end_of_writing_leaves_nothing(tmp_path, monkeypatch):
    """Parts are moved into their place one by one."""
    plain, moved = Path.rename, []

    def rename(path, target):
        moved.append(plain(path, target))
        if len(moved) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as at, pytest.raises(KeyboardInterrupt):
        at.setattr(Path, "rename", rename)
        write_random(tmp_path / "c", small_config(num_layers=1))
    assert not (tmp_path / "c").exists()
    assert ckpt0.verify(write_random(tmp_path / "c", small_config(num_layers=1))).ok


def test_existing_folders_are_not_written_over(random_checkpoint):
    with pytest.raises(FileExistsError, match="not empty"):
        write_random(random_checkpoint, small_config())


@pytest.mark.parametrize("groups", [1, 2, 4, 8, 16])
def test_any_number_of_scale_groups(tmp_path, groups):
    """Every group count reads as the same weights within the rounding of int8."""
    directory = write_random(tmp_path / "c", small_config(num_layers=1, widening_factor=1.5), groups=groups)
    assert gs.verify(directory).ok
    ids = list(range(3, 30))
    expanded, kept = (
        gs.load(directory, weights=w).trace(ids, capture="logits")["logits"] for w in ("expanded", "int8")
    )
    np.testing.assert_allclose(expanded, kept, atol=1e-4)


@pytest.mark.parametrize("groups", [1, 3, 8])
@pytest.mark.parametrize("rows", [(), (1,), (5,), (2, 3)])
def test_a_product_of_int8_is_that_of_its_float32(monkeypatch, groups, rows):
    """Whole, and a part of a group at a time."""
    rng = np.random.default_rng(0)
    weight = quant.quantize(rng.standard_normal((48, 16)), groups)
    x = rng.standard_normal((*rows, 48)).astype(np.float32)
    for at_once in (quant.WIDENED, 70):
        monkeypatch.setattr(quant, "WIDENED", at_once)
        found = quant.matmul(jax.numpy.asarray(x), jax.tree.map(jax.numpy.asarray, weight))
        np.testing.assert_allclose(found, x @ quant.dequantize(weight), atol=1e-5)


def test_a_large_matrix_is_widened_in_parts():
    """Of 64 MB in float32, a third at most is there at a time."""
    weight = quant.QuantizedWeight(
        jax.ShapeDtypeStruct((4096, 4096), np.int8), jax.ShapeDtypeStruct((8, 4096), jax.numpy.bfloat16)
    )
    for rows in ((4096,), (1, 7, 4096)):
        lowered = jax.jit(quant.matmul).lower(jax.ShapeDtypeStruct(rows, np.float32), weight)
        assert lowered.compile().memory_analysis().temp_size_in_bytes < 22e6


def test_the_default_form(random_checkpoint, monkeypatch):
    """Larger models are int8, but with several last caches expanded where they fit."""
    small, found = gs.load(random_checkpoint).config, []
    for several in (False, True):
        monkeypatch.setattr(weights, "several_last_caches", lambda several=several: several)
        configs = small, dataclasses.replace(small, vocab_size=1 << 20), gs.GROK_1
        found.append([weights.default_form(config, np.dtype(np.float32)) for config in configs])
    assert found == [["expanded", "int8", "int8"], ["expanded", "expanded", "int8"]]


def test_hash_sees_a_router_and_a_size(checkpoint):
    before = ckpt0.open_checkpoint(checkpoint).hash()
    assert before == ckpt0.open_checkpoint(checkpoint).hash()
    router = checkpoint / "ckpt-0" / "tensor00013_000"
    data = bytearray(router.read_bytes())
    data[-20] ^= 1
    router.write_bytes(bytes(data))
    assert before != ckpt0.open_checkpoint(checkpoint).hash()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_q_heads": 5}, "not a multiple"),
        ({"key_size": 7}, "odd"),
        ({"num_selected_experts": 9}, "exceeds"),
        ({"vocab_size": 0}, "at least 1"),
        ({"emb_size": 4.5}, "whole number"),
        ({"widening_factor": "8"}, "positive number"),
        ({"widening_factor": 1e30}, "too wide"),
        ({"widening_factor": 1e-3}, "no width"),
        ({"emb_size": 10**400}, "whole number from 0, below"),
        ({"num_layers": 100_000_000}, "at most 8192"),
        ({"eos_token": 500}, "outside the vocabulary"),
        ({"prompt_bos": 1}, "true or false"),
    ],
)
def test_configs_that_make_no_sense(change, words):
    with pytest.raises(ValueError, match=words):
        small_config(**change)


def test_sizes_of_grok_1():
    assert gs.GROK_1.num_parameters == 315_684_820_992
    assert round(gs.GROK_1.num_active_parameters / 1e9, 1) == 83.8
    assert gs.GROK_1.ffn_size == 32768
    assert gs.GrokConfig.from_json(gs.GROK_1.to_json()) == gs.GROK_1


def test_memory_that_is_taken_as_it_is():
    """XLA on CPU does not copy it; what is cut from a piece does not overlap."""
    pages = weights.Pages(1 << 16)
    made = [pages.empty((3, n), np.dtype(kind)) for n in (1, 50, 40_000, 7) for kind in (np.float32, np.int8)]
    for number, array in enumerate(made):
        array[...] = number
    assert all((array == number).all() for number, array in enumerate(made))
    assert all(jax.device_put(array).unsafe_buffer_pointer() == array.ctypes.data for array in made)
