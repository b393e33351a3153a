# SPDX-License-Identifier: Apache-2.0
"""Which tests are more of the same: marked ``exhaustive``, which continuous integration leaves out
to stay within its time (``VMTH_TEST_MARKS='not exhaustive'``), and where records go.

``sh scripts/test`` runs them. Of each file in KEPT what is named is one case of each kind; of each
test in THINNED every so many-th case of its table is kept, the first one always.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

KEPT = {
    "test_qemu_kill.py": ("test_the_source_vmth_dies[hold the guest]",),
    "test_qemu_kill_relay.py": (),  # test_relay_qemu.py has the relay's own
    # .ci/run crosses versions with those that are idle or paused.
    "test_qemu_migrate.py": ("test_busy_guest_goes_round[multifd-zstd-plain]",),
    "test_qemu_keep_image.py": ("test_a_guest_that_comes_back_brings_what_changed[memory]",),
    "test_qemu_migrate_carried.py": (
        "test_busy_guest_goes_through_a_file[live]",
        "test_busy_guest_goes_through_relays[two relays, compressed]",
    ),
    "test_qemu_receive.py": (
        "test_a_guest_arrives_and_runs_on[memory-True-False-memory]",
        "test_a_guest_arrives_and_runs_on[stream-True-False-stream]",
        "test_a_paused_guest_arrives_paused_and_can_move_on",
        "test_a_guest_arrives_in_a_call_from_python",
        "test_a_qemu_that_vmth_starts_lives_on",
        "test_a_killed_receiver_leaves_nothing_that_the_next_does_not_end",
    ),
    "test_qemu_save_real.py": (
        "test_a_running_guest_is_saved_and_runs_on_elsewhere[True]",
        "test_a_save_that_is_killed[cold-pages]",
        "test_a_full_disk",
        "test_a_damaged_file_is_found_before_qemu_is_touched",
    ),
    "test_qemu_throttle.py": (),  # test_throttle_let_go.py has the core's
    "test_qemu_versions.py": (),  # .ci/run crosses from the installed one to 10.0 and back
    "test_relay_qemu.py": (
        "test_precopy[plain-one relay]",
        "test_precopy[multifd-two with zstd]",
        "test_relay_killed_within_ram_and_the_next_try_succeeds[two]",
        "test_lost_shut_leaves_the_source_running_and_the_destination_paused",
    ),
}
THINNED = {
    "test_a_bad_link_never_harms_the_guest": 4,
    "test_every_workload_moves_live_and_loses_nothing": 4,
    "test_the_destination_mover_dies": 4,
    "test_the_source_mover_dies": 4,
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    seen: dict[str, int] = {}
    for item in items:
        name = item.name.partition("[")[0]
        seen[name] = seen.get(name, -1) + 1
        if seen[name] % THINNED.get(name, 1):
            item.add_marker("exhaustive")
        kept = KEPT.get(item.path.name)
        if kept is not None and item.name not in kept:
            item.add_marker("exhaustive")


@pytest.fixture(scope="session", autouse=True)
def own_state_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Whoever names no directory for records has none of this machine's: a migration of its owner
    may be under way, and its lock would fail the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VMTH_STATE_DIR", str(tmp_path_factory.mktemp("state")))
        yield
