"""ifguide.distributed.ledger: attempts and entries are on storage."""

from ifguide.distributed.ledger import Attempts, Entry, finished_entries, unfinished_attempts, write_entry


def test_attempts_survive_their_process_and_are_forgotten_when_done(tmp_path):
    Attempts(tmp_path, "s").begin()
    again = Attempts(tmp_path, "s")  # another process reads what the first one wrote
    assert (again.made, again.reason) == (1, "its process died")
    again.begin()
    again.failed("ValueError: x")
    assert (Attempts(tmp_path, "s").made, Attempts(tmp_path, "s").reason) == (2, "ValueError: x")
    write_entry(tmp_path, Entry(key="s", result={}, attempts=2, seconds=1.0))
    again.forget()
    assert unfinished_attempts(tmp_path) == []
    assert list(finished_entries(tmp_path)) == ["s"]
