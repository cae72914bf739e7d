"""A campaign from its start to its report, repeats, kills, and input that is refused."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bioseq
from bioseq.campaigns.campaign import Campaign, Objective, Settings, read_csv, wells
from bioseq.campaigns.ingest import ingest
from bioseq.campaigns.ledger import Event, Ledger
from bioseq.campaigns.space import combinations, listed
from bioseq.errors import BioseqError, InputError, MutationError, SpecError, TableError
from bioseq.sequences.mutations import parse
from bioseq.specs.propose import ProposeSpec
from training.campaigns.command import main
from training.campaigns.propose import propose, score_variants
from training.campaigns.report import report

WILD = "MKTAYIAKQRQISFVKSHFSRQ"


def settings(**more: Any) -> Settings:
    values: dict[str, Any] = {
        "wild_type": WILD,
        "objectives": ("activity:max",),
        "sites": (4, 7),
        "batch": 24,
    }
    return Settings(**values | more)


@pytest.fixture
def campaign(tmp_path: Path) -> Campaign:
    rng = np.random.default_rng(0)
    return Campaign.create(tmp_path / "c", settings(), prior=rng.normal(size=(len(WILD), 20)))


def truth(variant: str) -> float:
    return sum(ord(m[-1]) * (i + 1) % 17 for i, m in enumerate(variant.split(":"))) / 10


def results(campaign: Campaign, path: Path, number: int = 1, failed: int = 0) -> Path:
    with open(campaign.round_folder(number) / "plate.csv") as plate, open(path, "w") as out:
        out.write("variant,well,activity\n")
        for i, row in enumerate(csv.DictReader(plate)):
            out.write(f"{row['variant']},{row['well']},{'' if i < failed else truth(row['variant'])}\n")
    return path


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_three_rounds_and_a_report(campaign: Campaign, tmp_path: Path) -> None:
    seen: set[str] = set()
    for number in (1, 2, 3):
        assert propose(campaign)["variants"] == 20
        rows = read_csv(campaign.round_folder(number) / "plate.csv")
        new = [r["variant"] for r in rows if r["kind"] == "variant"]
        assert not seen & set(new) and len(set(new)) == 20
        assert all(r["reason"] for r in rows) and len({r["well"] for r in rows}) == 24
        if number > 1:
            assert all(
                float(r["activity_low"]) < float(r["activity_high"]) for r in rows if r["kind"] == "variant"
            )
            assert sum(r["kind"] == "best so far" for r in rows) == 1
        seen |= set(new)
        ingest(campaign, results(campaign, tmp_path / f"{number}.csv", number))
    status = campaign.status()
    assert status["rounds"] == 3 and status["wells"]["measured"] == 72
    assert status["best"]["activity:max"]["value"] == pytest.approx(max(map(truth, seen)))
    report(campaign, tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert page.count("data:image/png;base64,") == 5 and "http://" not in page and "https://" not in page
    mean, sd = score_variants(campaign, sorted(seen))
    assert np.corrcoef(mean, [truth(v) for v in sorted(seen)])[0, 1] > 0.8 and (sd > 0).all()


def test_a_proposal_repeats_to_the_byte(campaign: Campaign, tmp_path: Path) -> None:
    propose(campaign)
    ingest(campaign, results(campaign, tmp_path / "1.csv"))
    shutil.copytree(campaign.folder, tmp_path / "copy")
    propose(campaign)
    propose(Campaign(tmp_path / "copy"))
    assert snapshot(campaign.folder) == snapshot(tmp_path / "copy")
    before = snapshot(campaign.folder)
    propose(campaign)  # nothing happened since: the same round again
    assert snapshot(campaign.folder) == before
    propose(campaign, more=True)  # wells under way are not proposed again
    rows = [r for n in (2, 3) for r in read_csv(campaign.round_folder(n) / "plate.csv")]
    variants = [r["variant"] for r in rows if r["kind"] == "variant"]
    assert len(set(variants)) == len(variants)


def test_the_verbs_in_python(campaign: Campaign, tmp_path: Path) -> None:
    opened = bioseq.campaign(campaign.folder)
    assert opened.propose()["round"] == 1 and opened.propose()["round"] == 1
    assert opened.propose(more=True)["round"] == 2
    assert opened.ingest(results(campaign, tmp_path / "1.csv"), round_=1)["measured"] == 24
    assert opened.mark("ordered", []) == 24 and opened.status()["rounds"] == 2
    opened.report(tmp_path / "r.html")
    assert (tmp_path / "r.html").stat().st_size > 10_000
    with pytest.raises(InputError, match="is not a campaign"):
        bioseq.campaign(tmp_path)


def test_a_propose_of_a_job_that_is_tried_again_makes_no_second_round(
    campaign: Campaign, tmp_path: Path
) -> None:
    spec = ProposeSpec(campaign=str(campaign.folder), output=str(tmp_path / "out"), after=0)
    (tmp_path / "spec.json").write_text(spec.to_json())
    for attempt in range(2):  # the first died after its round was made, and results came meanwhile
        if attempt:
            ingest(campaign, results(campaign, tmp_path / "1.csv"))
        assert main(["propose", "--spec", str(tmp_path / "spec.json")]) == 0
        assert campaign.status()["rounds"] == 1
        assert (tmp_path / "out/plate.csv").read_text() == campaign.plate(1)
    with pytest.raises(SpecError, match="folder"):
        main(["propose"])
    with pytest.raises(SpecError, match="after"):
        ProposeSpec(campaign="c", after=-1)


def test_a_kill_at_any_byte_of_the_ledger_is_survived(campaign: Campaign, tmp_path: Path) -> None:
    propose(campaign)
    start = campaign.ledger.path.read_bytes()
    table = results(campaign, tmp_path / "1.csv")
    ingest(campaign, table)
    whole = snapshot(campaign.folder)
    end = campaign.ledger.path.read_bytes()
    for cut in range(len(start), len(end), 97):
        campaign.ledger.path.write_bytes(end[:cut])
        assert campaign.status()["wells"]["measured"] == 0
        ingest(campaign, table)
        assert snapshot(campaign.folder) == whole
    for cut in range(0, len(start), 97):  # the proposal itself
        campaign.ledger.path.write_bytes(start[:cut])
        propose(campaign)
        assert campaign.ledger.path.read_bytes() == start


def test_a_kill_between_files_and_ledger(campaign: Campaign, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(self: Ledger, events: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "append", killed)
        with pytest.raises(KeyboardInterrupt):
            propose(campaign)
    left = (campaign.round_folder(1) / "plate.csv").read_bytes()
    assert campaign.status()["rounds"] == 0
    propose(campaign)
    assert (campaign.round_folder(1) / "plate.csv").read_bytes() == left


def test_failed_wells_may_come_again_abandoned_ones_not(tmp_path: Path) -> None:
    few = settings(sites=(4,), batch=19, controls=0)
    campaign = Campaign.create(tmp_path / "c", few)
    propose(campaign)
    ingest(campaign, results(campaign, tmp_path / "1.csv", failed=3))
    failed = {e.variant for e in campaign.state().wells.values() if e.event == "failed"}
    campaign.mark("abandoned", [sorted(failed)[0]])
    propose(campaign)
    again = {r["variant"] for r in read_csv(campaign.round_folder(2) / "plate.csv")}
    assert again == set(sorted(failed)[1:])


def test_plate_effects_come_from_wild_types(campaign: Campaign) -> None:
    rows = [("WT", 1, 1.0), ("WT", 1, 1.2), ("A4C", 1, 2.0), ("WT", 2, 2.0), ("WT", 2, 2.2), ("A4D", 2, 3.0)]
    campaign.ledger.append(
        [Event("measured", r, f"+{i}", v, "x", (y,), (None,)) for i, (v, r, y) in enumerate(rows)]
    )
    found = campaign.state().measured(0)
    # plates differ by 1; the variance within them is 0.02 and the means' 0.5, so that 0.98 of it is taken for plates
    assert found["A4C"][0] == pytest.approx(2.49) and found["A4D"][0] == pytest.approx(2.51)
    assert found["WT"][1] == 4


def test_plate_effects_within_the_noise_of_wild_types_are_not_subtracted(campaign: Campaign) -> None:
    rows = [("WT", 1, 0.0), ("WT", 1, 2.0), ("A4C", 1, 2.0), ("WT", 2, 0.2), ("WT", 2, 2.2), ("A4D", 2, 3.0)]
    campaign.ledger.append(
        [Event("measured", r, f"+{i}", v, "x", (y,), (None,)) for i, (v, r, y) in enumerate(rows)]
    )
    found = campaign.state().measured(0)
    assert (found["A4C"][0], found["A4D"][0]) == (2.0, 3.0)


def test_several_objectives_and_a_threshold(tmp_path: Path) -> None:
    campaign = Campaign.create(
        tmp_path / "c", settings(objectives=("activity:max", "size:min", "heat:>=1.0"))
    )
    propose(campaign)
    path = tmp_path / "r.csv"
    with open(campaign.round_folder(1) / "plate.csv") as plate, open(path, "w") as out:
        out.write("variant,well,activity,size,heat\n")
        for row in csv.DictReader(plate):
            v = row["variant"]
            out.write(f"{v},{row['well']},{truth(v)},{truth(v[::-1])},{1.5 if '4' in v else 0.5}\n")
    ingest(campaign, path)
    propose(campaign)
    rows = [r for r in read_csv(campaign.round_folder(2) / "plate.csv") if r["kind"] == "variant"]
    assert np.mean(["A4" in r["variant"] for r in rows]) > 0.9


BAD = {
    "columns": ("mutant,activity\nA4C,1\n", "line 1: there is no column 'variant'"),
    "unknown column": ("variant,activity,colour\nA4C,1,red\n", "line 1: column 'colour' is not known"),
    "number": ("variant,activity\nA4C,1\nA4D,high\n", "line 3, column 'activity': 'high' is not a number"),
    "infinite": ("variant,activity\nA4C,inf\n", "line 2, column 'activity': 'inf' is not allowed"),
    "contradiction": ("variant,activity\nC4A,1\n", "line 2, column 'variant': C4A: the wild type has A"),
    "outside": ("variant,activity\nK2A,1\n", "line 2, column 'variant': K2A is outside"),
    "beyond the end": (
        "variant,activity\nA99C,1\n",
        "line 2, column 'variant': A99C: position 99 is outside",
    ),
    "doubled well": (
        "variant,well,activity\nWT,{w},1\nWT,{w},2\n",
        "line 3, column 'well': {w} was given in line 2",
    ),
    "no such well": ("variant,well,activity\nWT,H99,1\n", "line 2, column 'well': round 1 has no well H99"),
    "other variant": (
        "variant,well,activity\nA4C:A7C,{w},1\n",
        "line 2, column 'variant': well {w} holds WT",
    ),
    "named and assigned": ("variant,well,activity\nWT,{w},1\nWT,{w},2\n", "column 'well': {w} was given"),
    "round": ("variant,round,activity\nA4C,2,1\n", "line 2, column 'round': '2'; rounds 1 to 1"),
    "underscore": ("variant,activity\nA4C,1_5\n", "line 2, column 'activity': '1_5' is not a number"),
    "failed with a value": ("variant,status,activity\nA4C,failed,1\n", "column 'status': a failed well"),
    "quote": ('variant,activity\nA4C,"1\n', "line 2: unexpected end of data"),
    "no rows": ("variant,activity\n", "there are no rows"),
    "cells": ("variant,activity\nA4C\n", "line 2: fewer cells"),
    "status": ("variant,status,activity\nA4C,lost,1\n", "line 2, column 'status': 'lost'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_results_name_line_and_column_and_change_nothing(
    campaign: Campaign, tmp_path: Path, name: str
) -> None:
    propose(campaign)
    rows = read_csv(campaign.round_folder(1) / "plate.csv")
    well = next(r["well"] for r in rows if r["variant"] == "WT")
    text, message = (part.replace("{w}", well) for part in BAD[name])
    before = snapshot(campaign.folder)
    (tmp_path / "bad.csv").write_text(text)
    with pytest.raises(TableError) as error:
        ingest(campaign, tmp_path / "bad.csv")
    assert message in str(error.value)
    assert snapshot(campaign.folder) == before


def test_an_objective_without_data_is_refused(tmp_path: Path) -> None:
    campaign = Campaign.create(tmp_path / "c", settings(objectives=("activity:max", "heat:max")))
    propose(campaign)
    (tmp_path / "r.csv").write_text("variant,activity,heat\nA4C,1,\nA4D,2,\n")
    with pytest.raises(TableError, match="'heat': the objective has no value"):
        ingest(campaign, tmp_path / "r.csv")


def test_corrections_and_the_same_file_twice(campaign: Campaign, tmp_path: Path) -> None:
    propose(campaign)
    table = results(campaign, tmp_path / "1.csv")
    ingest(campaign, table)
    with pytest.raises(TableError, match="ingested before"):
        ingest(campaign, table)
    (variant, well) = next(
        (e.variant, w) for (_, w), e in campaign.state().wells.items() if e.variant != "WT"
    )
    (tmp_path / "2.csv").write_text(f"variant,well,activity\n{variant},{well},99\n")
    with pytest.raises(TableError, match="pass --correct"):
        ingest(campaign, tmp_path / "2.csv")
    ingest(campaign, tmp_path / "2.csv", correct=True)
    assert campaign.status()["best"]["activity:max"]["variant"] == variant
    campaign.mark("excluded", [variant])
    assert campaign.status()["best"]["activity:max"]["variant"] != variant


def test_rows_find_the_wells_of_their_round_and_no_well_twice(campaign: Campaign, tmp_path: Path) -> None:
    propose(campaign)
    propose(campaign, more=True)
    first = read_csv(campaign.round_folder(1) / "plate.csv")
    controls = [r["well"] for r in first if r["variant"] == "WT"]
    lines = [f"{r['variant']},1,{truth(r['variant'])}" for r in first if r["variant"] != "WT"]
    # the last row names a well that an earlier row without one would have been given
    lines += [f"WT,1,{n}" for n in range(len(controls) - 1)]
    (tmp_path / "r.csv").write_text(
        "variant,round,well,activity\n"
        + "".join(f"{a},{b},,{c}\n" for a, b, c in (x.split(",") for x in lines))
        + f"WT,1,{controls[0]},7\n"
    )
    assert ingest(campaign, tmp_path / "r.csv") == {"measured": 24, "failed": 0, "unproposed": 0}
    wells_of = campaign.state().wells
    assert wells_of[1, controls[0]].values == (7.0,)
    assert {e.event for (r, _), e in wells_of.items() if r == 1} == {"measured"}
    assert {e.event for (r, _), e in wells_of.items() if r == 2} == {"proposed"}
    variant = next(r["variant"] for r in first if r["variant"] != "WT")
    (tmp_path / "c.csv").write_text(f"variant,activity\n{variant},50\n")
    with pytest.raises(TableError, match="round 2 has no other well of"):
        ingest(campaign, tmp_path / "c.csv", correct=True)
    ingest(campaign, tmp_path / "c.csv", round_=1, correct=True)
    assert campaign.state().measured(0)[variant][1] == 1


def test_rows_may_name_their_wells_alone(campaign: Campaign, tmp_path: Path) -> None:
    """As a plate reader writes them."""
    propose(campaign)
    plate = [r for r in read_csv(campaign.round_folder(1) / "plate.csv") if r["variant"] != "WT"]
    one, two, three = (r["well"] for r in plate[:3])
    (tmp_path / "r.csv").write_text(f"well,activity\n{one},3.5\n{two.lower()},\n")
    assert ingest(campaign, tmp_path / "r.csv") == {"measured": 1, "failed": 1, "unproposed": 0}
    found = campaign.state().wells
    assert (found[1, one].variant, found[1, one].values) == (plate[0]["variant"], (3.5,))
    assert (found[1, two].variant, found[1, two].event) == (plate[1]["variant"], "failed")
    (tmp_path / "r.csv").write_text(f"well,activity\n{three},1\n,2\nZ9,1\n{three},2\n")
    with pytest.raises(TableError) as error:
        ingest(campaign, tmp_path / "r.csv")
    for fault in ("line 3, column 'variant'", "line 4, column 'well': round 1 has no well Z9",
                  f"line 5, column 'well': {three} was given in line 2"):  # fmt: skip
        assert fault in str(error.value)
    assert campaign.state().wells[1, three].event == "proposed"


def test_the_same_results_saved_again_are_not_replicates(campaign: Campaign, tmp_path: Path) -> None:
    propose(campaign)
    table = results(campaign, tmp_path / "1.csv")
    (tmp_path / "plain.csv").write_text(
        "".join(
            ",".join((line.split(",")[0], line.split(",")[2])) + "\n"
            for line in table.read_text().splitlines()
        )
    )
    ingest(campaign, tmp_path / "plain.csv")
    (tmp_path / "again.csv").write_text((tmp_path / "plain.csv").read_text() + "\n")
    with pytest.raises(TableError, match="taken in before"):
        ingest(campaign, tmp_path / "again.csv")


def test_the_plate_with_a_column_of_results_is_taken(campaign: Campaign, tmp_path: Path) -> None:
    propose(campaign)
    ingest(campaign, results(campaign, tmp_path / "1.csv"))
    propose(campaign)
    rows = read_csv(campaign.round_folder(2) / "plate.csv")
    with open(tmp_path / "filled.csv", "w", newline="") as out:
        writer = csv.DictWriter(out, [*rows[0], "activity"])
        writer.writeheader()
        writer.writerows(r | {"activity": str(truth(r["variant"]))} for r in rows)
    assert ingest(campaign, tmp_path / "filled.csv")["measured"] == 24


def test_thresholds_alone_choose_among_all_that_should_pass(tmp_path: Path) -> None:
    campaign = Campaign.create(tmp_path / "c", settings(objectives=("activity:>=0",)))
    propose(campaign)
    ingest(campaign, results(campaign, tmp_path / "1.csv"))  # all pass
    propose(campaign)
    rows = read_csv(campaign.round_folder(2) / "plate.csv")
    first = {r["variant"].split(":")[0] for r in rows if r["kind"] == "variant"}
    assert len(first) > 8  # of twenty residues at the first site


def test_the_best_misses_no_threshold_and_a_loose_result_uses_up_no_round(tmp_path: Path) -> None:
    campaign = Campaign.create(tmp_path / "c", settings(objectives=("activity:max", "heat:>=5")))
    (tmp_path / "r.csv").write_text("variant,activity,heat\nA4C,9,1\nA4D,2,6\n")
    ingest(campaign, tmp_path / "r.csv")
    assert campaign.status()["best"]["activity:max"] == {"variant": "A4D", "value": 2.0}
    first = propose(campaign)
    assert propose(campaign) == first and campaign.status()["rounds"] == 1


def test_letters_at_the_sites_and_variants_never_proposed(campaign: Campaign, tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text("variant,activity\nCD,1\nA4C:A7D,2\nA7D:A4C,3\n")
    assert ingest(campaign, tmp_path / "r.csv")["unproposed"] == 3
    assert campaign.state().measured(0)["A4C:A7D"][:2] == (2.0, 3)


@pytest.mark.parametrize("file", ["campaign.toml", "prior.csv", "ledger.csv", "rounds/01/plate.csv"])
def test_edits_by_hand_are_refused(campaign: Campaign, file: str) -> None:
    propose(campaign)
    path = campaign.folder / file
    path.write_text(path.read_text().replace("4", "5", 1))
    with pytest.raises(InputError, match="changed by hand"):
        propose(Campaign(campaign.folder), more="plate" not in file)


def test_wells_and_variants_can_be_excluded(campaign: Campaign) -> None:
    rows = [("A4C", 1, 9.0), ("A4C", 1, 1.0), ("A4D", 1, 3.0)]
    campaign.ledger.append(
        [Event("measured", r, f"+{i}", v, "x", (y,), (None,)) for i, (v, r, y) in enumerate(rows)]
    )
    assert campaign.mark("excluded", ["1/+0"]) == 1
    assert campaign.state().measured(0)["A4C"][:2] == (1.0, 1)
    with pytest.raises(InputError, match="1/\\+0, 2/A1: no well that can be marked excluded"):
        campaign.mark("excluded", ["1/+0", "A4C", "2/A1"])
    assert campaign.mark("excluded", ["A4C"]) == 1
    assert set(campaign.state().measured(0)) == {"A4D"}


def test_an_objective_with_few_values_keeps_no_other_from_learning(tmp_path: Path) -> None:
    campaign = Campaign.create(tmp_path / "c", settings(objectives=("activity:max", "heat:max")))
    propose(campaign)
    path = tmp_path / "r.csv"
    with open(campaign.round_folder(1) / "plate.csv") as plate, open(path, "w") as out:
        out.write("variant,well,activity,heat\n")
        for i, row in enumerate(csv.DictReader(plate)):
            out.write(f"{row['variant']},{row['well']},{truth(row['variant'])},{i if i < 3 else ''}\n")
    ingest(campaign, path)
    found = propose(campaign)
    assert set(found["believed"]) == {"activity"} and "heat: " in found["left_out"][0]
    rows = [r for r in read_csv(campaign.round_folder(2) / "plate.csv") if r["kind"] == "variant"]
    assert all(r["activity_predicted"] and not r["heat_predicted"] for r in rows)


@pytest.mark.parametrize(
    "change, error",
    [
        ({"sites": (4, 99)}, MutationError),
        ({"sites": (4,), "forbidden": (4,)}, InputError),
        ({"sites": (4,), "allowed": {"4": "A"}}, InputError),
        ({"objectives": ("activity:most",)}, SpecError),
        ({"objectives": ("a", "a:min")}, SpecError),
        ({"batch": 97}, SpecError),
        ({"controls": 24}, SpecError),
        ({"plate": 100}, SpecError),
        ({"budget": -3}, SpecError),
        ({"objectives": ("well",)}, SpecError),
        ({"objectives": ("a", "a_low")}, SpecError),
    ],
)
def test_bad_settings_leave_no_folder(
    tmp_path: Path, change: dict[str, Any], error: type[BioseqError]
) -> None:
    with pytest.raises(error):
        Campaign.create(tmp_path / "c", settings(**change))
    assert not (tmp_path / "c").exists()


def test_candidate_files(tmp_path: Path) -> None:
    file = tmp_path / "list.csv"
    file.write_text("variant\nA4C\nA7D:A4C\nA4C\n" + WILD.replace("A", "G") + "\n")
    campaign = Campaign.create(tmp_path / "c", settings(batch=6, sites=()), file=file)
    assert campaign.space.size == 3
    assert propose(campaign)["variants"] == 2
    file.write_text("variant\nA4C\nK4C\n")
    with pytest.raises(TableError, match="line 3, column 'variant'"):
        Campaign.create(tmp_path / "d", settings(), file=file)


def test_sizes_of_spaces() -> None:
    assert combinations(WILD, [4, 7, 9, 10], None, {}).size == 20**4 - 1
    two = combinations(WILD, [4, 7, 9], 2, {4: "ACD"})
    assert two.size == (2 + 19 + 19) + (2 * 19 * 2 + 19 * 19)
    rows = two.pool(np.random.default_rng(0), np.zeros((0, 3), np.uint8))
    assert len(rows) == two.size and all(two.holds(two.decode(r)) for r in rows)
    three = combinations(WILD, [4, 7, 9, 10], 3, {10: "CD"}).pool(np.random.default_rng(0), rows[:0])
    assert (
        len(three) == len(np.unique(three, axis=0)) == combinations(WILD, [4, 7, 9, 10], 3, {10: "CD"}).size
    )
    large = combinations(WILD, [], None, {})
    assert (
        large.size == 20 ** len(WILD) - 1 and len(large.pool(np.random.default_rng(0), rows[:0, :0])) > 10_000
    )
    one = listed(WILD, [parse("A4C", WILD), parse("A4C", WILD)])
    assert one.size == 1


def test_plates_and_objectives() -> None:
    assert wells(96)[-1] == "H12" and wells(384)[-1] == "P24" and len(set(wells(384))) == 384
    assert Objective.read("heat:>=-1.5") == Objective("heat", ">=", -1.5)
