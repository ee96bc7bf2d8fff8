"""`astro-hpc trace`."""

from __future__ import annotations

from test_cloning_stage import make_config, run_stage, walk_trees

from astro_hpc.report.trace_text import find_example, marked_pieces, print_example


def test_an_example_is_shown_piece_by_piece(tmp_path, capsys):
    astro, direct, _ = run_stage(tmp_path, walk_trees(12), "t/traces")
    cfg = make_config(tmp_path)
    row = find_example(cfg, "astro")
    assert row["k"] == max(r["k"] for r in astro) == 2
    assert find_example(cfg, "direct", direct[-1]["id"]) == direct[-1]
    assert find_example(cfg, "astro", astro[-1]["problem_id"])["problem_id"] == astro[-1]["problem_id"]
    pieces = list(marked_pieces(row))
    kinds = [kind for _, kind, _ in pieces]
    assert (kinds.count("step wrong"), kinds.count("step right"), kinds.count("backtrack")) == (2, 1, 2)
    print_example(row)
    shown = capsys.readouterr().out
    assert row["id"] in shown
    for mark, _, words in pieces:
        assert mark in shown
        assert words.splitlines()[0] in shown


def test_what_a_model_wrote_does_not_steer_the_terminal(tmp_path, capsys):
    run_stage(tmp_path, walk_trees(3), "t/traces")
    row = find_example(make_config(tmp_path), "astro")
    span = next(span for span in row["graph"]["spans"] if span["kind"] == "step")
    text = row["completion"]
    row["completion"] = text[: span["start"]] + "\x1b[2J"[: span["end"] - span["start"]] + text[span["start"] + 4 :]
    print_example(row)
    assert "\x1b[2J" not in capsys.readouterr().out
