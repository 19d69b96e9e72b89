"""GGUF files as a source of tensors: data equal to the gguf package's reading, split files, and errors with their exact words."""

from __future__ import annotations

import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize as reference_dequantize

from qwen2.quant import FORMATS, format_id
from qwen2.weights import gguf as gguf_module
from qwen2.weights.gguf import GGUFFile

AGAIN = "download the parts again"


def write(path: Path, tensors: dict[str, tuple[np.ndarray, str]], metadata: dict[str, int] | None = None) -> Path:
    """A file by the gguf package's writer: raw blocks (rows, bytes of a row) and the name of their type."""
    writer = gguf.GGUFWriter(path, "qwen2")
    for key, value in (metadata or {}).items():
        writer.add_uint16(key, value)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def blocks(kind: str, rows: int, blocks_per_row: int, seed: int = 0) -> np.ndarray:
    size = FORMATS[format_id(kind)].bytes * blocks_per_row
    return np.random.default_rng(seed).integers(0, 120, (rows, size), dtype=np.uint8)


@pytest.fixture
def every_type(tmp_path: Path) -> Path:
    return write(tmp_path / "all.gguf", {form.name: (blocks(form.name, 6, 3), form.name) for form in FORMATS.values()})


@pytest.mark.parametrize("piece", [256, 1024, 1 << 20])
def test_every_type_equals_the_gguf_package(every_type: Path, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_module, "PIECE", piece)  # whatever is read at a time
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(every_type).tensors}
    with GGUFFile.open(every_type) as file:
        for form in FORMATS.values():
            data = theirs[form.name].data
            expected = reference_dequantize(data.view(np.uint8), theirs[form.name].tensor_type).astype(np.float32)
            got = file.tensor(form.name)
            assert got.shape == file.info(form.name).shape == (6, 3 * form.block)
            np.testing.assert_array_equal(got.numpy().view(np.uint32).ravel(), expected.view(np.uint32).ravel())
            assert file.raw(form.name).tobytes() == file.mapped(form.name).tobytes() == data.tobytes()


def test_a_slice_of_a_stack_goes_into_its_place(tmp_path: Path) -> None:
    data = blocks("Q5_0", 8, 2).reshape(4, 2, -1)
    with GGUFFile.open(write(tmp_path / "x.gguf", {"stack": (data, "Q5_0")})) as file:
        whole = file.tensor("stack")
        out = torch.zeros(3, 2, 64, dtype=torch.bfloat16)
        assert file.tensor("stack", out=out[1], index=2).data_ptr() == out[1].data_ptr()
        assert torch.equal(out[1], whole[2].to(torch.bfloat16))
        assert not out[0].any()
        assert not out[2].any()


def test_a_mapped_tensor_outlives_the_file_and_never_writes_to_it(tmp_path: Path) -> None:
    path = write(tmp_path / "x.gguf", {"t": (np.arange(12, dtype=np.float32).reshape(3, 4), "F32")})
    before = path.read_bytes()
    with GGUFFile.open(path) as file:
        tensor = torch.from_numpy(file.mapped("t")).view(torch.float32).view(3, 4)
    tensor += 1
    assert torch.equal(tensor, torch.arange(12.0).view(3, 4) + 1)
    assert path.read_bytes() == before


@pytest.mark.slow
def test_real_weights_equal_the_gguf_package(coder: Path) -> None:
    reader = gguf.GGUFReader(coder)
    kinds: dict[str, int] = {}
    with GGUFFile.open(coder) as file:
        for tensor in reader.tensors:
            name = tensor.tensor_type.name
            kinds[name] = kinds.get(name, 0) + 1
            if kinds[name] > 3 or tensor.n_elements > 5_000_000:
                continue
            expected = reference_dequantize(tensor.data, tensor.tensor_type)
            assert torch.equal(file.tensor(tensor.name), torch.from_numpy(expected.copy()).view(file.info(tensor.name).shape))
    assert kinds == {"Q5_0": 133, "F32": 121, "Q8_0": 13, "Q6_K": 12, "Q4_K": 12}


def test_errors_of_single_tensors(tmp_path: Path) -> None:
    path = write(tmp_path / "x.gguf", {"t": (np.zeros((2, 66), dtype=np.uint8), "IQ2_XXS"), "u": (np.zeros(3, dtype=np.float32), "F32")})
    with GGUFFile.open(path) as file:
        with pytest.raises(ValueError) as error:
            file.tensor("t")
        names = "F32, F16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, BF16"
        assert str(error.value) == f"{path}: tensor 't' is stored as IQ2_XXS, which is not supported; supported are {names}"
        with pytest.raises(ValueError) as error:
            file.raw("v")
        assert str(error.value) == f"{path}: there is no tensor 'v'; the file holds 2 others"
        with pytest.raises(ValueError) as error:
            file.tensor("u", out=torch.zeros(4))
        assert str(error.value) == f"{path}: tensor 'u' has shape (3,), and (4,) is wanted"
        with path.open("r+b") as stream:
            stream.truncate(file.info("u").offset + 5)
        with pytest.raises(ValueError) as error:
            file.tensor("u")
        what = "tensor 'u' ends early, the file became shorter since it was opened"
        assert str(error.value) == f"{path}: {what}; download it again"


def split_model(folder: Path, count: int = 3, **changes: int) -> list[Path]:
    paths = [folder / f"m-{i + 1:05}-of-{count:05}.gguf" for i in range(count)]
    for i, path in enumerate(paths):
        tensors = {f"t{i}": (np.full((2, 32), i, dtype=np.float32), "F32")}
        write(path, tensors, {"split.no": i, "split.count": count, "split.tensors.count": count} | changes)
    return paths


def test_the_first_part_brings_the_others(tmp_path: Path) -> None:
    paths = split_model(tmp_path)
    with GGUFFile.open(paths[0]) as file:
        assert file.split.count == 3
        assert list(file.tensors) == ["t0", "t1", "t2"]
        for i in range(3):
            assert torch.equal(file.tensor(f"t{i}"), torch.full((2, 32), float(i)))
            assert file.mapped(f"t{i}").tobytes() == file.raw(f"t{i}").tobytes()


def test_split_errors(tmp_path: Path) -> None:
    paths = split_model(tmp_path)
    with pytest.raises(ValueError) as error:
        GGUFFile.open(paths[1])
    assert str(error.value) == f"{paths[1]}: the file is part 00002 of 3; open the first part, m-00001-of-00003.gguf"

    renamed = tmp_path / "model.gguf"
    shutil.copy(paths[0], renamed)
    with pytest.raises(ValueError) as error:
        GGUFFile.open(renamed)
    assert str(error.value) == f"{renamed}: the file is one of 3 parts; its name must end in -00001-of-00003.gguf, beside the others"

    shutil.copy(paths[1], paths[2])
    with pytest.raises(ValueError) as error:
        GGUFFile.open(paths[0])
    assert str(error.value) == f"{paths[2]}: split.no and split.count are (1, 3), not (2, 3); {AGAIN}"

    paths[2].unlink()
    with pytest.raises(FileNotFoundError) as missing:
        GGUFFile.open(paths[0])
    assert str(missing.value) == f"{paths[0]}: of 3 parts are missing m-00003-of-00003.gguf; put them into the same folder"


def test_split_counts_are_checked(tmp_path: Path) -> None:
    paths = split_model(tmp_path, **{"split.tensors.count": 4})
    with pytest.raises(ValueError) as error:
        GGUFFile.open(paths[0])
    assert str(error.value) == f"{paths[0]}: 4 tensors are announced and the parts hold 3; {AGAIN}"

    for i, path in enumerate(paths):
        write(path, {"same": (np.zeros((2, 32), dtype=np.float32), "F32")}, {"split.no": i, "split.count": 3})
    with pytest.raises(ValueError) as error:
        GGUFFile.open(paths[0])
    assert str(error.value) == f"{paths[1]}: tensor 'same' is also in m-00001-of-00003.gguf; {AGAIN}"


def test_a_split_count_beyond_reason(tmp_path: Path) -> None:
    path = write(tmp_path / "x.gguf", {}, {"split.count": 65535})
    with pytest.raises(ValueError) as error:
        GGUFFile.open(path)
    assert str(error.value) == f"{path}: split.count 65535 is not a number from 1 to 1024; download the file again"
