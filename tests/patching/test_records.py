"""The repository's own records against the installed upstreams: every row of `nxdt-nemo patches verify`."""

from __future__ import annotations

import importlib.util

import pytest

from nxdt_nemo._resources import folder
from nxdt_nemo.patching.records import Record, load
from nxdt_nemo.patching.verify import live, static

RECORDS = load(folder("patches"))
by_record = pytest.mark.parametrize("record", RECORDS, ids=[record.id for record in RECORDS])
needs_upstream = pytest.mark.skipif(
    importlib.util.find_spec("nemo") is None, reason="the extra `nemo` is not installed"
)


@needs_upstream
@by_record
def test_target_version_fingerprint_and_replacement(record: Record) -> None:
    finding = static(record)
    assert finding.ok, finding.why


@needs_upstream
@pytest.mark.slow
def test_every_target_is_our_object_in_an_activated_process() -> None:
    """One process for all: importing NeMo takes most of a minute."""
    findings = live(RECORDS)
    assert {id_: finding.why for id_, finding in findings.items() if finding.ok is False} == {}
    reached = {id_ for id_, finding in findings.items() if finding.ok}
    apart = {id_ for id_, finding in findings.items() if "needs nvidia_resiliency_ext" in finding.why}
    assert apart <= {"speculative"}  # NeMo 2.0 does not import without it
    assert reached | apart == {record.id for record in RECORDS if "cpu" in record.lanes}
