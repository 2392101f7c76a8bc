"""Stores of what a teacher said: runs from them are those of the teacher itself, and what does not fit is refused."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import metrics
from served import serving
from tiny import save_tiny_model

from distil_kernels.train.__main__ import main
from distil_kernels.train.serve_teacher import TeacherServer
from distil_kernels.train.teachers import store as store_module
from distil_kernels.train.teachers.base import TopKTarget
from distil_kernels.train.teachers.store import DTYPES, Store, rows_of, topk_of

OPTIONS = [
    "--preset", "kd", "--prompts_per_step", "6", "--max_new_tokens", "8", "--num_examples", "1", "--eval_every", "0",
    "--eval_problems", "2", "--learning_rate", "1e-3", "--warmup_steps", "1",
]  # fmt: skip


@pytest.fixture(scope="module")
def expert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("expert"), initializer_range=0.15, hidden_size=48)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "records.jsonl"
    lines = [{"question": f"{n}?", "answer": "abcdefghijkl"[: 1 + n % 12]} for n in range(40)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return f"qa:{path}"


def local(expert: Path) -> list[str]:
    return ["--teacher", "local", "--teacher_model", str(expert)]


def recorded(model: Path, expert: Path, task: str, folder: Path, *options: str, status: int = 0) -> Path:
    common = [str(folder), "--model", str(model), "--task", task, *OPTIONS, "--steps", "4", *local(expert)]
    assert main(["record_teacher", *common, *options]) == status
    return folder


def run(model: Path, task: str, runs: Path, name: str, *options: str, status: int = 0) -> Any:
    arguments = ["--model", str(model), "--task", task, "--runs_dir", str(runs), "--name", name, "--steps", "4"]
    assert main([*arguments, *OPTIONS, *options]) == status
    return metrics(runs / name) if status == 0 else None


@pytest.fixture(scope="module")
def hidden(tiny_model: Path, expert: Path, task: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stores") / "hidden"
    return recorded(tiny_model, expert, task, folder, "--payload", "hidden", "--dtype", "float32")


@pytest.fixture(scope="module")
def direct(tiny_model: Path, expert: Path, task: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Steps with the teacher itself."""
    found = run(tiny_model, task, tmp_path_factory.mktemp("runs"), "direct", *local(expert))
    return [record for record in found if record["kind"] == "step"]


def test_a_run_from_hidden_states_is_the_teachers_own(
    tiny_model: Path, expert: Path, task: str, hidden: Path, direct: list[dict[str, Any]], tmp_path: Path
) -> None:
    """In float32 to the last digits; in bfloat16 to its rounding."""
    halves = recorded(tiny_model, expert, task, tmp_path / "bf16", "--payload", "hidden", "--dtype", "bfloat16")
    for folder, tolerance in ((hidden, 1e-5), (halves, 2e-2)):
        found = run(
            tiny_model, task, tmp_path, f"of_{folder.name}", "--teacher", "stored", "--teacher_store", str(folder)
        )
        for ours, theirs in zip([r for r in found if r["kind"] == "step"], direct, strict=True):
            for name in ("loss", "kl", "teacher_entropy", "grad_norm"):
                assert ours[name] == pytest.approx(theirs[name], rel=tolerance, abs=1e-6), name
        assert all(record["teacher"] is None for record in found if record["kind"] == "evaluation")
    sizes = [folder.joinpath("shard-00000.safetensors").stat().st_size for folder in (hidden, halves)]
    assert sizes[1] < 0.6 * sizes[0]
    assert main(["report", str(tmp_path / "of_hidden")]) == 0
    assert main(["inspect", str(tmp_path / "of_hidden")]) == 2  # a store knows nothing of held-out answers


def test_a_run_from_log_probs_is_that_of_the_teachers_top(
    tiny_model: Path, expert: Path, task: str, direct: list[dict[str, Any]], tmp_path: Path
) -> None:
    """All 260 tokens: then the cross-entropy is the whole one, to the rounding of what is stored."""
    folder = recorded(tiny_model, expert, task, tmp_path / "store", "--teacher_top", "260", "--dtype", "float16")
    found = run(tiny_model, task, tmp_path, "stored", "--teacher", "stored", "--teacher_store", str(folder))
    for ours, theirs in zip([r for r in found if r["kind"] == "step"], direct, strict=True):
        assert ours["ce"] == pytest.approx(theirs["ce"], rel=3e-3)
        assert ours["tail"] == pytest.approx(0.0, abs=1e-5) and ours["unmapped"] == 0


def test_a_resumed_run_repeats_an_uninterrupted_one_and_is_evaluated(
    tiny_model: Path, task: str, hidden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = ("--teacher", "stored", "--teacher_store", str(hidden), "--checkpoint_every", "2")
    whole = run(tiny_model, task, tmp_path, "whole", *stored)
    run(tiny_model, task, tmp_path, "parts", *stored, "--steps", "2")
    assert main(["--resume", str(tmp_path / "parts"), "--steps", "4"]) == 0
    steps, found = ([r for r in rs if r["kind"] == "step"] for rs in (whole, metrics(tmp_path / "parts")))
    assert found == steps
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "parts")]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["teacher"] is None


@pytest.mark.slow
def test_teachers_behind_servers_can_be_recorded(
    tiny_model: Path, expert: Path, task: str, hidden: Path, tmp_path: Path
) -> None:
    """Hidden states of a server are those of the model here, and so are a server's log-probs."""
    common = ["--model", str(tiny_model), "--task", task, *OPTIONS, "--steps", "1", "--dtype", "float32"]
    server = TeacherServer(str(expert), "127.0.0.1", 0, "float32")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = ["--teacher", "hidden", "--teacher_url", server.url, "--teacher_model", str(expert)]
    try:
        assert main(["record_teacher", str(tmp_path / "states"), *common, *url, "--payload", "hidden"]) == 0
        assert main(["record_teacher", str(tmp_path / "local"), *common, *local(expert), "--teacher_top", "6"]) == 0
    finally:
        server.close()
    with serving(expert, "vllm") as other:
        url = ["--teacher", "remote", "--teacher_url", other.url, "--teacher_top", "6"]
        assert main(["record_teacher", str(tmp_path / "served"), *common, *url]) == 0
        assert main(["record_teacher", str(tmp_path / "no"), *common, *url, "--payload", "hidden"]) == 2
    for name, with_name in (("states", hidden), ("served", tmp_path / "local")):
        ours, theirs = Store(tmp_path / name, "STORE"), Store(with_name, "STORE")
        assert 0 < len(ours) <= len(theirs)
        for key in ours._places:
            found, wanted = ours.rows([key]), theirs.rows([key])
            assert found is not None and wanted is not None
            for part in found:
                torch.testing.assert_close(found[part], wanted[part], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_leaves_the_tail(dtype: str) -> None:
    generator = torch.Generator().manual_seed(1)
    logprobs, ids = torch.randn(50, 300, generator=generator).mul(3).log_softmax(1).topk(20)
    target = TopKTarget(ids, logprobs, torch.zeros(50))
    ids[3, 5:], logprobs[3, 5:] = -1, -torch.inf
    found = topk_of(rows_of(target, DTYPES[dtype], top=24))
    assert found.ids.shape == (50, 24) and torch.equal(found.ids[:, :20], ids) and (found.ids[:, 20:] == -1).all()
    torch.testing.assert_close(found.tail, target.tail, atol=1e-6, rtol=0)
    known = logprobs > -torch.inf
    error = (found.logprobs[:, :20] - logprobs)[known].abs().max()
    assert error < {"float32": 1e-5, "float16": 0.01, "bfloat16": 0.08}[dtype]


def test_a_recording_that_was_cut_short_goes_on(
    tiny_model: Path, expert: Path, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of its second shard; a whole one is not asked for again."""
    monkeypatch.setattr(store_module, "SHARD_TOKENS", 40)
    whole = Store(recorded(tiny_model, expert, task, tmp_path / "whole"), "STORE")
    assert len(whole.index["shards"]) > 2
    save, count = store_module._save, [0]

    def killed(path: Path, tensors: Any) -> None:
        count[0] += 1
        if count[0] == 2:
            path.with_name(path.name + ".tmp").write_bytes(b"half")
            raise KeyboardInterrupt
        save(path, tensors)

    monkeypatch.setattr(store_module, "_save", killed)
    folder = recorded(tiny_model, expert, task, tmp_path / "cut", status=130)
    assert len(Store(folder, "STORE").index["shards"]) == 1
    first = (folder / "shard-00000.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(store_module, "_save", save)
    again = Store(recorded(tiny_model, expert, task, folder), "STORE")
    assert (folder / "shard-00000.safetensors").stat().st_mtime_ns == first
    assert again._places.keys() == whole._places.keys() and len(whole) == 24
    for key in whole._places:
        ours, theirs = again.rows([key]), whole.rows([key])
        assert ours is not None and theirs is not None
        assert torch.equal(ours["ids"], theirs["ids"]) and torch.equal(ours["logprobs"], theirs["logprobs"])


def test_what_does_not_fit_is_refused(
    tiny_model: Path, expert: Path, task: str, hidden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*options: str, model: Path = tiny_model, of: str = task, folder: Path = hidden, status: int = 2) -> str:
        capsys.readouterr()
        run(model, of, tmp_path, "run", "--teacher", "stored", "--teacher_store", str(folder), *options, status=status)
        message = capsys.readouterr().err
        assert message.count("\n") == 1, message
        return message

    assert "[teacher_store]" in said(folder=tmp_path) and "expected what record_teacher wrote" in said(folder=tmp_path)
    assert "[num_examples]" in said("--num_examples", "2") and "recorded with num_examples 1, got 2" in said(
        "--num_examples", "2"
    )
    assert "[max_new_tokens]" in said("--max_new_tokens", "9")
    other_task = tmp_path / "records.jsonl"
    other_task.write_text(Path(task.removeprefix("qa:")).read_text().replace("3?", "4?"))
    assert "the file of --task another content" in said(of=f"qa:{other_task}")
    other_tokens = tmp_path / "other"
    shutil.copytree(tiny_model, other_tokens)
    words = other_tokens / "tokenizer.json"
    words.write_text(words.read_text().replace('"<eos>"', '"<end>"'))
    config = other_tokens / "tokenizer_config.json"
    config.write_text(config.read_text().replace('"<eos>"', '"<end>"'))
    assert "the vocabulary of --model another content" in said(model=other_tokens)

    # Of the same data, but more of it than was recorded: the run ends, and says how to go on.
    fewer = tmp_path / "fewer"
    recorded(tiny_model, expert, task, fewer, "--steps", "1", "--dtype", "bfloat16")
    message = said("--overwrite", folder=fewer, status=1)
    assert "lacks" in message and "record_teacher with the run's --steps" in message
    assert (tmp_path / "run" / "checkpoint" / "model.safetensors").exists()
    assert "[objective] a store of top log-probs takes forward_ce, got jsd" in said(
        "--objective", "jsd", "--overwrite", folder=fewer
    )

    # Another model under way: of a recording, and of a resumed run.
    capsys.readouterr()
    recorded(tiny_model, tiny_model, task, fewer, "--dtype", "bfloat16", status=2)
    assert "was made with" in capsys.readouterr().err
    other = recorded(tiny_model, tiny_model, task, tmp_path / "of_another", "--dtype", "bfloat16")
    shutil.rmtree(fewer)
    shutil.copytree(other, fewer)
    assert main(["--resume", str(tmp_path / "run")]) == 2
    assert "recorded of another teacher" in capsys.readouterr().err

    damaged = tmp_path / "damaged"
    shutil.copytree(hidden, damaged)
    shard = damaged / "shard-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    message = said("--overwrite", folder=damaged, status=1)
    assert "not as it was written" in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--teacher", "live", "--feedback", "correction"], "[teacher] record_teacher takes one that stays as it is"),
        (["--rollouts", "student", "--rollouts_per_prompt", "2"], "[rollouts] record_teacher writes what is learnt"),
        (["--teacher_temperature", "2"], "[teacher_temperature] payload topk takes 1.0, got 2.0"),
        (["--payload", "logits"], "--payload"),
        (["--teacher", "stored", "--teacher_model", ""], "[teacher_store] belongs to teacher stored"),
    ],
)
def test_what_cannot_be_recorded(
    tiny_model: Path,
    expert: Path,
    task: str,
    tmp_path: Path,
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [str(tmp_path / "store"), "--model", str(tiny_model), "--task", task, *OPTIONS, *local(expert), *options]
    if "live" in options:
        given += ["--teacher_model", ""]
    try:
        status = main(["record_teacher", *given])
    except SystemExit as stop:
        status = int(stop.code or 0)
    assert status == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "store").exists()
