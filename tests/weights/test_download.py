"""Over real connections to a server on this host."""

import hashlib
import os
import socket
import threading
import time

import pytest

from vmamba.errors import UserError
from vmamba.weights.download import Unavailable, arriving, receive

CONTENT = os.urandom(3_000_000)


@pytest.fixture
def target(tmp_path):
    return tmp_path / "folder" / "weights.pth"


@pytest.fixture
def part(target):
    return target.with_name("weights.pth.part")


def get(url, target, expected=CONTENT):
    """Download with a check of the hash."""

    def check(path):
        if hashlib.sha256(path.read_bytes()).digest() != hashlib.sha256(expected).digest():
            raise UserError("wrong hash")

    with arriving(target, check) as part:
        if part is not None:
            receive(url, part)


def one_line(error) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def leftovers(target) -> set[str]:
    return {path.name for path in target.parent.iterdir()} - {target.name}


def test_whole(server, target):
    server.files["a file.pth"] = CONTENT
    get(f"{server.url}/a%20file.pth", target)
    assert target.read_bytes() == CONTENT
    assert leftovers(target) == set()
    assert server.requests == [("a file.pth", None)]


def test_broken_connections_are_taken_up_again(server, target):
    server.files["w"] = CONTENT
    server.cuts = [1_000_000, 500_000, 1]
    get(f"{server.url}/w", target)
    assert target.read_bytes() == CONTENT
    assert [asked for _, asked in server.requests] == [None, "bytes=1000000-", "bytes=1500000-", "bytes=1500001-"]


def test_a_later_run_goes_on(server, target, part):
    server.files["w"] = CONTENT
    server.cuts = [1_200_000, 0]
    with pytest.raises(Unavailable, match="broke off after 1,200,000 of 3,000,000 bytes"):
        get(f"{server.url}/w", target)
    assert not target.exists()
    assert part.stat().st_size == 1_200_000
    get(f"{server.url}/w", target)
    assert target.read_bytes() == CONTENT
    assert server.requests[-1] == ("w", "bytes=1200000-")
    assert leftovers(target) == set()


def test_a_part_that_is_whole_already(server, target, part):
    """The last run ended between the last byte and the name."""
    server.files["w"] = CONTENT
    server.cuts = [100, 0]
    with pytest.raises(Unavailable):
        get(f"{server.url}/w", target)
    part.write_bytes(CONTENT)
    get(f"{server.url}/w", target)
    assert target.read_bytes() == CONTENT
    assert server.requests[-1] == ("w", "bytes=3000000-")


def test_another_file_by_now(server, target, part):
    """Two halves of different files are no file."""
    server.files["w"] = os.urandom(3_000_000)
    server.cuts = [1_200_000, 0]
    with pytest.raises(Unavailable):
        get(f"{server.url}/w", target)
    server.files["w"] = CONTENT
    get(f"{server.url}/w", target)
    assert target.read_bytes() == CONTENT


def test_a_shorter_file_by_now(server, target, part):
    server.files["w"] = os.urandom(4_000_000)
    server.cuts = [3_500_000, 0]
    with pytest.raises(Unavailable):
        get(f"{server.url}/w", target)
    server.files["w"] = CONTENT
    get(f"{server.url}/w", target)
    assert target.read_bytes() == CONTENT


def test_another_source_starts_anew(server, target):
    server.files |= {"one": os.urandom(3_000_000), "two": CONTENT}
    server.cuts = [1_200_000, 0]
    with pytest.raises(Unavailable):
        get(f"{server.url}/one", target)
    get(f"{server.url}/two", target)
    assert target.read_bytes() == CONTENT
    assert server.requests[-1] == ("two", None)


@pytest.mark.parametrize("lacking", ["ranges", "etags"])
def test_servers_that_cannot_resume(server, target, lacking):
    setattr(server, lacking, False)
    server.files["w"] = CONTENT
    server.cuts = [1_200_000]
    get(f"{server.url}/w", target)
    assert target.read_bytes() == CONTENT


def test_redirect_keeps_the_range(server, target):
    server.files["far/away"] = CONTENT
    server.redirects["w"] = "/far/away"
    server.cuts = [1_200_000]
    get(f"{server.url}/w", target)
    assert target.read_bytes() == CONTENT
    assert server.requests[-2:] == [("w", "bytes=1200000-"), ("far/away", "bytes=1200000-")]


def test_redirect_in_circles(server, target):
    server.redirects["w"] = "/w"
    with pytest.raises(Unavailable, match="HTTP 302"):
        get(f"{server.url}/w", target)


def test_wrong_hash(server, target):
    server.files["w"] = CONTENT[:-1] + b"x" if CONTENT[-1:] != b"x" else CONTENT[:-1] + b"y"
    with pytest.raises(UserError, match="wrong hash"):
        get(f"{server.url}/w", target)
    assert not target.exists()
    assert leftovers(target) <= {"weights.pth.lock"}


@pytest.mark.parametrize("status", [404, 403, 503])
def test_refused(server, target, status):
    server.status["w"] = status
    with pytest.raises(Unavailable) as error:
        get(f"{server.url}/w", target)
    assert f"{server.url}/w could not be downloaded: HTTP {status}" in one_line(error)


def test_a_web_page_is_no_file(server, target):
    server.files["w"] = b"<html>log in first</html>"
    server.content_type = "text/html; charset=utf-8"
    with pytest.raises(Unavailable, match="leads to a web page, not to a file"):
        get(f"{server.url}/w", target)


def test_nobody_there(target):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(Unavailable) as error:
        get(f"http://127.0.0.1:{port}/w", target)
    assert "could not be reached" in one_line(error)
    assert "refused" in one_line(error)


def test_a_host_that_does_not_exist(target):
    with pytest.raises(Unavailable, match="could not be reached"):
        get("http://nowhere.invalid/w", target)


def test_a_folder_that_cannot_be_made(server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to"):
        get(f"{server.url}/w", tmp_path / "file" / "weights.pth")


def test_a_full_disk(server, target, part, full_at_a_million):
    server.files["w"] = CONTENT
    with pytest.raises(UserError) as error:
        get(f"{server.url}/w", target)
    assert f"cannot write {part}: File too large; run again to go on" in one_line(error)
    assert 0 < part.stat().st_size <= 1_000_000


def test_one_at_a_time(server, target):
    """Some ask at once: one downloads, the others wait and find the file; no lock is left."""
    server.files["w"] = CONTENT
    server.go_on = threading.Event()
    threads = [threading.Thread(target=get, args=(f"{server.url}/w", target)) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    server.go_on.set()
    for thread in threads:
        thread.join()
    assert target.read_bytes() == CONTENT
    assert leftovers(target) == set()
    assert len(server.requests) == 1
