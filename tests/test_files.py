import os
import signal
import subprocess
import sys

import pytest
from filelock import FileLock, Timeout

from hf_reflect.files import whole_file, write_whole
from hf_reflect.run import Run


def test_a_killed_writer_leaves_the_earlier_file_and_the_next_one_replaces_it(tmp_path):
    path = tmp_path / "new" / "numbers.json"
    write_whole(path, "earlier")
    script = (
        "import os, pathlib, signal, sys\nfrom hf_reflect.files import whole_file\n"
        "with whole_file(pathlib.Path(sys.argv[1])) as file:\n"
        "    file.write(b'half'); file.flush(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", script, path]).returncode == -signal.SIGKILL
    with pytest.raises(ZeroDivisionError), whole_file(path) as file:
        file.write(bytes([1 // 0]))
    assert path.read_text() == "earlier"
    write_whole(path, "half a pair: \ud83d")
    assert path.read_bytes() == b"half a pair: ?" and os.listdir(path.parent) == ["numbers.json"]


def test_a_run_that_an_error_ended_keeps_the_next_of_its_process_out_no_more_than_others_in(tmp_path):
    failed = Run(str(tmp_path))  # somebody, a traceback say, still holds it
    again = Run(str(tmp_path))
    with pytest.raises(Timeout):
        FileLock(tmp_path / ".lock").acquire(timeout=0)  # as another process would ask
    again.close()
    with FileLock(tmp_path / ".lock", timeout=0):
        assert failed.folder == again.folder
