"""Every command of the documentation does what its page says, at a tiny size."""

import json
import random
import signal

import pytest
import zstandard

from tests.docs.commands import PAGES, ROOT, Runner, of_page

WITH_COMMANDS = [page for page in PAGES if any(not command.is_elsewhere for command in of_page(page))]


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """What the pages take for given: recipes, text, and three Hub directories."""
    from lmboost import config
    from tests import hub

    desk = tmp_path_factory.mktemp("desk")
    (desk / "configs").symlink_to(ROOT / "configs")
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 6))) for _ in range(60)]
    (desk / "corpus" / "deep").mkdir(parents=True)
    for i in range(3):
        texts = [" ".join(draw.choices(words, k=draw.randint(20, 200))) for _ in range(40)]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (desk / "corpus" / "deep" / f"{i}.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    parent = config.load_module(str(ROOT / "configs" / "subnet_smollm2.py")).parent("tiny")
    hub.write(desk / "models" / "smollm2-135m")
    hub.write(desk / "models" / "smollm2-1.7b", parent)
    hub.write(desk / "models" / "qwen3-0.6b")
    hub.write_tokenizer(desk / "models" / "qwen3-0.6b", 300)
    return desk


@pytest.fixture(scope="module")
def runner(desk):
    return Runner()


@pytest.fixture
def own_signals():
    """Verbs take notices to stop for themselves."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_COMMANDS, ids=lambda page: page.stem)
def test_commands(page, desk, runner, own_signals, monkeypatch):
    monkeypatch.chdir(desk)
    for command in of_page(page):
        runner.run(command)
        assert command.is_elsewhere or not command.writes or (desk / command.writes).exists(), command.line
