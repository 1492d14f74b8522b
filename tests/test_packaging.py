"""A built wheel, not an editable install, carries the embedded model."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_a_wheel_opens_the_embedded_model_from_its_own_files(tmp_path):
    subprocess.run([sys.executable, "-m", "build", "--wheel", "-o", tmp_path, ROOT], check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        pages = {f"ppo_jax/{name}/page.{kind}" for name in ("report", "review") for kind in ("html", "css", "js")}
        assert pages <= set(wheel.namelist())
        wheel.extractall(tmp_path / "site")
    code = (
        "from ppo_jax import build, config_file; m = build.open_model(config_file.load()); "
        "print(m.path, m.spec.vocab_size)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "site"), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    path, vocabulary = done.stdout.split()[-2:]
    assert Path(path) == tmp_path / "site" / "ppo_jax" / "assets" / "tiny_reviews"
    assert vocabulary == "4096"
