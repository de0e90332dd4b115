"""The race checker of test_lock_waits finds planted faults, so that a run without violations means something."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from harness import Cluster
from harness.locks import Sql
from harness.race import Race

PLANTED = Path(__file__).with_name("planted")
ROUND = 6  # seconds


@pytest.mark.parametrize(
    ("module", "strikes", "seen"),
    [
        ("poll_takes_back", (), "was released, not by its holder"),
        ("poll_grants_to_gone", (), "was granted to a client that had left, or was refused"),
        ("twin_takes_back", (), "was released, not by its holder"),
        ("drain_forgets", ("drain",), "was granted to a client that had left, or was refused"),
        ("hang_up_takes_back", (), "was released, not by its holder"),
        ("hang_up_unnoticed", (), "was granted to a client that had left, or was refused"),
        ("key_forgotten", (), "one key was answered the grants"),
    ],
)
def test_the_race_checker_finds(
    module: str, strikes: tuple[str, ...], seen: str, start_cluster: Callable[..., Cluster], sql: Sql, seed: int
) -> None:
    cluster = start_cluster(app=f"{module}:app", env={"PYTHONPATH": str(PLANTED)}, config="server: {threads: 96}")
    for number in range(20):
        race = Race(cluster, f"race-{number}", f"{seed}/{number}", strikes)
        race.run(ROUND)
        broken = [text for text in race.violations(sql) if seen in text]
        if broken:
            print(f"{len(broken)} after {ROUND * (number + 1)} s, as {broken[0]}")
            return
    pytest.fail(f"no violation in {number + 1} rounds, {dict(race.figures())}")
