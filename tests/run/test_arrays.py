"""Records that are .npz files: what is written, and that axes said as data are those that the names say."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moe_testbed.launcher.run import array_file
from moe_testbed.launcher.run.array_file import DAMAGED, LETTERS, ArrayFile, Values, load_arrays
from moe_testbed.launcher.run.arrays import Ablation, Evaluation, RoutingProbe

RECORDS = (Evaluation, RoutingProbe, Ablation)

ON_DISK = {
    Evaluation: {
        "step": "int64",
        "tokens_D": "int64",
        "loss_sum_D": "float64",
        "sequence_loss_N": "float64",
        "violation_sum_SY": "float64",
        "counts_top_1_YDE": "int64",
        "counts_top_k_YDE": "int64",
        "dropped_YDE": "int64",
        "cluster_counts_YCE": "int64",
        "coactivation_YEE": "int64",
        "vocabulary_counts_YVE": "int64",
        "shuffled_counts_top_k_YDE": "int64",
        "weight_YDE": "float64",
        "entropy_sum_YD": "float64",
        "probability_sum_YDE": "float64",
        "margin_sum_YD": "float64",
        "vocabulary_ids_V": "int64",
        "router_cosine_YEE": "float32",
        "domains": "<U4",
        "sequence_domain_N": "int64",
        "sequence_cluster_N": "int64",
        "cluster_domain_C": "int64",
    },
    RoutingProbe: {
        "step": "int64",
        "domains": "<U4",
        "domain_T": "int16",
        "expert_ids_YTW": "int16",
        "counts_top_k_YDE": "int64",
    },
    Ablation: {
        "domains": "<U4",
        "sequence_domain_N": "int64",
        "baseline_loss_N": "float64",
        "owner_YE": "int64",
        "group_YE": "int64",
        "ablation_loss_YEN": "float32",
        "mean_loss_YEN": "float32",
        "forced_loss_DN": "float32",
        "expert_cosine_YEE": "float32",
        "expert_cka_YEE": "float32",
        "effective_rank_Y": "float64",
        "weight_cosine_YEE": "float32",
        "redundancy_tokens": "int64",
    },
}
"""Names and types of all arrays that a training of commit 9340c6c wrote."""
ADDED = {
    Evaluation: {
        "correct_D": "int64",
        "kinds": "<U4",
        "kind_tokens_X": "int64",
        "kind_loss_sum_X": "float64",
        "kind_correct_X": "int64",
        "routed_tokens_YD": "int64",
    },
}
"""Those that were added since. A name or type once written stays, since runs that have it are read."""

SIZES = {"layer": 2, "domain": 3, "expert": 4, "sequence": 6, "cluster": 5, "token id": 7, "probe token": 8}


def filled(kind: type[ArrayFile]) -> ArrayFile:
    """A record with every array, no two axes of equal size by chance."""
    rng = np.random.default_rng(0)
    values: dict[str, object] = {}
    for name, known in kind.fields().items():
        shape = [SIZES.get(axis, 9) for axis in known.axes]
        if known.values is Values.NAMES:
            values[name] = ("one", "two", "four")
        elif known.values is Values.REAL:
            values[name] = rng.standard_normal(shape)
        else:
            values[name] = rng.integers(0, 3, shape) if shape else 7
    return kind(**values)


@pytest.mark.parametrize("kind", RECORDS)
def test_the_axes_of_a_field_are_the_letters_of_its_name(kind: type[ArrayFile]) -> None:
    for name, known in kind.fields().items():
        letters = "".join(LETTERS[axis] for axis in known.axes)
        of_names = known.values is Values.NAMES
        assert name == f"{known.axes[0]}s" if of_names else name.endswith(f"_{letters}" if letters else name)


@pytest.mark.parametrize("kind", RECORDS)
def test_names_and_types_on_disk_are_those_ever_written(kind: type[ArrayFile]) -> None:
    with np.load(io.BytesIO(filled(kind).to_bytes())) as stored:
        assert {name: str(stored[name].dtype) for name in stored.files} == ON_DISK[kind] | ADDED.get(kind, {})


@pytest.mark.parametrize("kind", RECORDS)
def test_what_is_written_is_read(kind: type[ArrayFile], tmp_path: Path) -> None:
    written = filled(kind)
    (tmp_path / "a.npz").write_bytes(written.to_bytes())
    read, left_out = kind.read(tmp_path / "a.npz")
    assert left_out == []
    assert read.arrays().keys() == written.arrays().keys()
    for name, array in written.arrays().items():
        np.testing.assert_array_equal(read.arrays()[name], array, err_msg=name)
    assert read.domains == ("one", "two", "four")  # type: ignore[attr-defined]
    for name, known in kind.fields().items():
        if known.axes and known.values is not Values.NAMES:
            assert getattr(read, name).dtype == (np.float64 if known.values is Values.REAL else np.int64), name


def test_arrays_that_nobody_knows_are_passed_over(tmp_path: Path) -> None:
    arrays = {name: array for name, array in filled(Ablation).arrays().items() if name != "group_YE"}
    np.savez(tmp_path / "a.npz", **arrays, of_a_later_version_XYZ=np.ones(2))
    read, left_out = Ablation.read(tmp_path / "a.npz")
    assert (read.group_YE, left_out) == (None, [])
    np.savez(tmp_path / "a.npz", domains=arrays["domains"])
    with pytest.raises(KeyError, match="baseline_loss_N"):
        Ablation.read(tmp_path / "a.npz")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_are_read_as_numpy_reads_them(tmp_path: Path, save: Callable[..., None]) -> None:
    """Also those by columns, those of one number, empty ones, names, and a header of the format's second version."""
    arrays = {
        "a": np.arange(6.0).reshape(2, 3), "b": np.asfortranarray(np.arange(6).reshape(2, 3)), "c": np.array(7),
        "d": np.zeros((0, 3), dtype=np.int16), "e": np.array(["é", "long"]), "f": np.array([True]),
    }  # fmt: skip
    path = tmp_path / "x.npz"
    save(path, **arrays)
    with zipfile.ZipFile(path, "a") as file, file.open("g.npy", "w") as member:
        np.lib.format.write_array(member, np.arange(3), version=(2, 0))
    found = load_arrays(path, [*arrays, "g", "missing"])
    with np.load(path) as expected:
        assert list(found) == [*arrays, "g"]
        for name, array in found.items():
            assert (array.dtype, array.shape) == (expected[name].dtype, expected[name].shape)
            np.testing.assert_array_equal(array, expected[name])


def test_python_objects_and_cut_off_arrays_are_not_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "objects.npz", a=np.array([{}], dtype=object))
    content = io.BytesIO()
    np.save(content, np.arange(9))
    with zipfile.ZipFile(tmp_path / "short.npz", "w") as file:
        file.writestr("a.npy", content.getvalue()[:-1])
    for name in ("objects", "short"):
        with pytest.raises(ValueError):
            load_arrays(tmp_path / f"{name}.npz", ["a"])


def test_what_would_fill_the_memory_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small file of zeros is refused by the sizes that it tells; so large a file is read, and so few zeros are."""
    monkeypatch.setattr(array_file, "MOST_BYTES", 1 << 16)
    path, zeros = tmp_path / "x.npz", np.zeros(1 << 17)
    np.savez(path, a=zeros)
    assert load_arrays(path, ["a"])["a"].nbytes == zeros.nbytes
    np.savez_compressed(path, a=zeros[: 1 << 12], b=zeros)
    assert load_arrays(path, ["a"])["a"].nbytes == 1 << 15
    with monkeypatch.context() as unpacked:
        unpacked.setattr(zipfile.ZipFile, "read", lambda *_: pytest.fail("it is unpacked"))
        with pytest.raises(ValueError, match=r"it has [\d,]+ bytes, of which 1,081,\d+ would come, as of a file"):
            load_arrays(path, ["a", "b"])


def npy(header: str, version: int = 1) -> bytes:
    """The content of an .npy file with this header and 64 bytes of numbers."""
    return (
        b"\x93NUMPY" + bytes([version, 0]) + len(header).to_bytes(2 * version, "little") + header.encode() + bytes(64)
    )


HOSTILE = {
    "more than the memory": npy("{'descr': '<f8', 'fortran_order': False, 'shape': (999999999999999,), }", 2),
    "more than can be addressed": npy("{'descr': '<f8', 'fortran_order': False, 'shape': (%s,), }" % ("9" * 30)),
    "a third version": npy("{'descr': '<f8', 'fortran_order': False, 'shape': (8,), }", 3),
    "no end": npy("{'descr': '<f8', 'fortran_order': (((("),
    "nothing but depth": npy("-" * 9000 + "1"),
    "no text": npy("\0" * 99),
    "Python objects": npy("{'descr': '|O', 'fortran_order': False, 'shape': (8,), }", 2),
    "nothing": b"",
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_headers_of_arrays_are_not_obeyed(name: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as file:
        file.writestr("a.npy", HOSTILE[name])
    with pytest.raises(DAMAGED):
        load_arrays(tmp_path / "x.npz", ["a"])


@pytest.mark.parametrize("step", [np.inf, np.nan, "seven", [1, 2], 1j])
def test_a_step_that_is_no_whole_number_makes_a_file_unusable(step: object, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", **{**filled(Evaluation).arrays(), "step": np.array(step)})
    with pytest.raises(DAMAGED):
        Evaluation.read(tmp_path / "x.npz")


@pytest.mark.parametrize("number", [np.nan, np.inf, 1e30, np.uint64(2**64 - 1)])
def test_whole_numbers_that_are_none_do_not_fit(number: float, tmp_path: Path) -> None:
    arrays = filled(Evaluation).arrays()
    ids_V = np.full_like(arrays["vocabulary_ids_V"], number, dtype=np.asarray(number).dtype)
    np.savez(tmp_path / "x.npz", **{**arrays, "vocabulary_ids_V": ids_V})
    read, left_out = Evaluation.read(tmp_path / "x.npz")
    assert (read.vocabulary_ids_V, left_out) == (
        None,
        ["vocabulary_ids_V has numbers that are not finite, or too large"],
    )
