"""Chat: a conversation through the checkpoint's template; mistakes in either come back as
sentences, before any work."""

import pytest
from test_tokenizer import TEMPLATE, checkpoint

import fp8jax


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return fp8jax.load_quantized(
        checkpoint(tmp_path_factory.mktemp("chat") / "c", chat_template=TEMPLATE), None
    )


HELLO = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]


def test_a_conversation_is_continued_as_the_template_writes_it(lm):
    options = {"max_new_tokens": 4, "temperature": 0}
    (expected,) = lm.generate(["system be brief. user hi. "], **options)
    assert lm.chat(HELLO, **options) == expected
    assert lm.chat(tuple(HELLO), **options) == expected


def test_template_options_reach_the_template(lm, monkeypatch):
    monkeypatch.setattr(
        lm.tokenizer, "chat_template", TEMPLATE + "{% if not thinking %}no{% endif %}"
    )
    options = {"max_new_tokens": 4, "temperature": 0}
    for thinking, text in ((True, "user hi. "), (False, "user hi. no")):
        answer = lm.chat(HELLO[1:], template_options={"thinking": thinking}, **options)
        assert answer == lm.generate([text], **options)[0]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hi", "list of messages.*got str 'hi'"),
        ({"role": "user", "content": "hi"}, "list of messages.*got dict"),
        ([], "list of messages.*got list"),
        (None, "list of messages.*got NoneType"),
        (["hi"], r"messages\[0\].*dict with a role and a content.*got str 'hi'"),
        ([HELLO[0], ("user", "hi")], r"messages\[1\].*got tuple"),
        ([{"role": "user"}], r"messages\[0\].*role and a content"),
        ([{"content": "hi"}], r"messages\[0\].*role and a content"),
        ([{"role": 1, "content": "hi"}], r"messages\[0\].*role and a content"),
    ],
)
def test_messages_of_another_form_are_refused(lm, messages, message):
    with pytest.raises(ValueError, match=message):
        lm.chat(messages)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}", "TemplateSyntaxError"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0]['content'] + 1 }}", "TypeError"),
        ("{{ messages[99]['content'] }}", "UndefinedError"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
    ],
)
def test_a_template_that_fails_is_a_sentence(lm, monkeypatch, template, message):
    monkeypatch.setattr(lm.tokenizer, "chat_template", template)
    monkeypatch.setattr(lm, "_functions", lambda: pytest.fail("work was done"))
    with pytest.raises(ValueError, match=f"chat template fails on these messages.*{message}"):
        lm.chat(HELLO)


def test_chat_without_a_template_says_so(lm, monkeypatch):
    monkeypatch.setattr(lm.tokenizer, "chat_template", None)
    with pytest.raises(ValueError, match="chat template.*has none"):
        lm.chat(HELLO)
