"""Memory that a process may take, in every arrangement of control groups."""

from __future__ import annotations

from pathlib import Path

import pytest

from cosmos_export import doctor
from cosmos_export.machine.memory import available_bytes

GIB = 1 << 30
FREE = 20 * GIB
NONE = 9223372036854771712
"""What version 1 says where there is no limit."""
V1 = "35 31 0:32 {part} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
V2 = "41 31 0:38 {part} {point} rw,nosuid shared:9 - cgroup2 cgroup2 rw\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable: {FREE // 1024} kB\n")
    return tmp_path


def system(root: Path, cgroup: str, mountinfo: str) -> None:
    (root / "proc/self/cgroup").write_text(cgroup)
    (root / "proc/self/mountinfo").write_text(f"22 1 0:21 / / rw - ext4 /dev/sda rw\n{mountinfo}")


def version_1(root: Path, path: str, limit: int, used: int = GIB, inactive: int = 0) -> None:
    folder = root / "sys/fs/cgroup/memory" / path
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"cache 5\ninactive_file 7\ntotal_inactive_file {inactive}\n")


def version_2(root: Path, path: str, limit: int | str, used: int = GIB, inactive: int = 0, high: str = "max") -> None:
    folder = root / "sys/fs/cgroup" / path
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.high").write_text(f"{high}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\ninactive_file {inactive}\n")


def test_without_groups_it_is_what_the_machine_has_free(root: Path) -> None:
    assert available_bytes(root) == FREE
    system(root, "0::/\n", V2.format(part="/", point="/sys/fs/cgroup"))
    assert available_bytes(root) == FREE


def test_version_1_and_the_groups_above(root: Path) -> None:
    system(root, "5:cpu:/other\n4:hugetlb,memory:/slurm/job/step\n0::/\n", V1.format(part="/"))
    version_1(root, "", NONE)
    version_1(root, "slurm", NONE)
    version_1(root, "slurm/job", 4 * GIB, used=3 * GIB, inactive=GIB)
    version_1(root, "slurm/job/step", NONE)
    assert available_bytes(root) == 2 * GIB
    version_1(root, "slurm/job/step", 2 * GIB, used=GIB)
    assert available_bytes(root) == GIB
    version_1(root, "other", 1)
    assert available_bytes(root) == GIB


def test_version_1_in_a_container_without_a_namespace(root: Path) -> None:
    """Its path is that of the host, and its own group is what is mounted."""
    system(root, "4:memory:/docker/0123\n", V1.format(part="/docker/0123"))
    version_1(root, "", 2 * GIB, used=GIB)
    assert available_bytes(root) == GIB
    version_1(root, "docker/0123", 1)
    assert available_bytes(root) == GIB


@pytest.mark.parametrize("path", ["/", "/../../host"])
def test_version_2_in_a_container(root: Path, path: str) -> None:
    system(root, f"0::{path}\n", V2.format(part="/", point="/sys/fs/cgroup"))
    version_2(root, "", 4 * GIB, used=3 * GIB, inactive=GIB // 2)
    assert available_bytes(root) == 3 * GIB // 2


def test_version_2_in_a_scope(root: Path) -> None:
    system(root, "0::/user.slice/run-1.scope\n", V2.format(part="/", point="/sys/fs/cgroup"))
    version_2(root, "user.slice", "max")
    version_2(root, "user.slice/run-1.scope", "max")
    assert available_bytes(root) == FREE
    version_2(root, "user.slice", 3 * GIB, used=GIB)
    assert available_bytes(root) == 2 * GIB
    version_2(root, "user.slice/run-1.scope", "max", used=GIB // 2, high=str(GIB))
    assert available_bytes(root) == GIB // 2
    version_2(root, "user.slice/run-1.scope", GIB // 4, used=GIB // 2)
    assert available_bytes(root) == 0


def test_both_versions_and_a_mount_point_with_a_space(root: Path) -> None:
    system(root, "4:memory:/a\n0::/b\n", V1.format(part="/") + V2.format(part="/", point="/sys/fs/cgroup/uni\\040fied"))
    version_1(root, "a", 5 * GIB)
    assert available_bytes(root) == 4 * GIB
    version_2(root, "uni fied/b", 3 * GIB)
    assert available_bytes(root) == 2 * GIB


@pytest.mark.parametrize("text", ["", "nonsense\n", "a b - c\n", "1 2 3 4 5 6 - cgroup2\n"])
def test_a_table_of_mounts_that_says_nothing(root: Path, text: str) -> None:
    system(root, "nonsense\n::\n", text)
    assert available_bytes(root) == FREE


def test_a_system_that_does_not_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OSError, match="meminfo"):
        available_bytes(tmp_path)
    monkeypatch.setattr(doctor, "available_bytes", lambda: available_bytes(tmp_path))
    assert doctor.facts(tmp_path, {}).memory_bytes is None


def test_doctor_says_what_a_build_would_take(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    system(root, "4:memory:/a\n", V1.format(part="/"))
    version_1(root, "a", 5 * GIB)
    monkeypatch.setattr(doctor, "available_bytes", lambda: available_bytes(root))
    assert doctor.facts(root, {}).memory_bytes == 4 * GIB
