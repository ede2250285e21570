"""ifguide.distributed.ledger: attempts and entries are on storage."""

from ifguide.distributed.ledger import Attempts, Entry, finished_entries, read_entry, unfinished_attempts, write_entry


def test_attempts_survive_their_process_and_are_forgotten_when_done(tmp_path):
    Attempts(tmp_path, "s").begin()
    again = Attempts(tmp_path, "s")  # another process reads what the first one wrote
    assert (again.made, again.reason) == (1, "its process died")
    again.begin()
    again.failed("ValueError: x")
    assert (Attempts(tmp_path, "s").made, Attempts(tmp_path, "s").reason) == (2, "ValueError: x")
    write_entry(tmp_path, Entry(key="s", result={}, attempts=2, seconds=1.0, files={}))
    again.forget()
    assert unfinished_attempts(tmp_path) == []
    assert list(finished_entries(tmp_path)) == ["s"]


def test_an_entry_that_is_damaged_is_none(tmp_path):
    for key in ("a", "b", "c", "d", "f"):
        write_entry(tmp_path, Entry(key=key, result={"tokens": 12}, attempts=1, seconds=1.0, files={}))
    a, b, c, f = (tmp_path / f"{key}.json" for key in "abcf")
    a.write_text(a.read_text().replace("12", "13"))
    b.write_text(b.read_text()[:20])
    c.write_text(c.read_text().replace("tokens", "Tokens"))
    flipped = bytearray(f.read_bytes())
    flipped[10] ^= 0x80  # no longer UTF-8
    f.write_bytes(flipped)
    assert [read_entry(tmp_path, key) is None for key in "abcdef"] == [True, True, True, False, True, True]
    assert list(finished_entries(tmp_path)) == ["d"]
    for text in ("[]", "null", '"x"', '{"a": 1}'):
        a.write_text(text)
        assert read_entry(tmp_path, "a") is None
        assert list(finished_entries(tmp_path)) == ["d"]
