"""The command line reads any file of options or refuses it with exit code 2."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from tangent_ops.cli.app import app

FUZZ = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
NAMES = st.sampled_from(["epochs", "lr", "shards", "public", "json", "config", "out", "by", "x"])
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.just("[" * 3000),
    st.just('!!python/object/apply:os.system ["exit 1"]'), st.just("&a [*a]"), st.just("{a: {}}"),
)  # fmt: skip
LINES = st.lists(
    st.builds(lambda n, s, v: f"{n} {s} {v}", NAMES, st.sampled_from("=:"), VALUES), max_size=4
)


@pytest.mark.parametrize("suffix", [".toml", ".yaml"])
@FUZZ
@given(content=st.one_of(st.binary(max_size=200), LINES.map("\n".join).map(str.encode)))
def test_any_file_of_options(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"options{suffix}"
    path.write_bytes(content)
    words = ["finetune", str(tmp_path / "none"), "--out", str(tmp_path / "run")]
    result = CliRunner().invoke(app, [*words, "--config", str(path)])
    assert result.exit_code == 2, (content, result.output, result.exception)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert [found.name for found in tmp_path.iterdir()] == [path.name]
