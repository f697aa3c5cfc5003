"""Check what people read of the program: help, errors, hints and warnings are whole thoughts in plain words.

docs/architecture.md states the rules. An error begins in lower case or with a name, because it follows "featcli:
error:", and has a verb. A hint does, too, and says what to do. Neither ends in a full stop. A help text is a thought of
its own that begins with a capital and ends in a full stop. The details of failed pictures and the reasons of choices
are labels beside a value, and need no verb.
"""

import ast
import itertools
import re
from pathlib import Path

import pytest
from test_spec import COMMANDS, of_each_command

import featcli
from featcli.errors import EXIT_CODES
from featcli.pixels.traits import TRAITS, lines
from featcli.spec.groups import PixelSpec
from featcli.spec.option import options_of

PACKAGE = Path(featcli.__file__).parent
VALUE = "\N{HORIZONTAL ELLIPSIS}"  # in place of what a message is given
ERROR = re.compile(r"(Usage|Conflict|Damaged|Checkpoint|Machine|Incomplete|Worker|Featcli)Error")
MOST_WAYS = 16  # ways to read one message, by what it is given
WIDTH = 80

# Words that show that a text is a sentence. Those that are nouns, too, such as `name`, count only at the beginning of a
# hint.
VERBS = frozenset(
    "is are was were be been has have had does do did can cannot could must may might will would holds hold takes take"
    " gives give needs need reads read says say makes make names ends lies stands misses lacks lack knows know finds"
    " loads means gets keeps runs changed died contradict exclude asks wants offers chooses allows tells keep comes"
    " frees fits fit belongs belong draws prepares sizes sets cut yields repairs resumes mends asked called ignores"
    " finds found begins begin writes write works goes leads looks tries assumes measures loaded mean"
    " uses started changes".split()
)
ORDERS = frozenset(
    "add ask call cast check choose compare convert copy decompress delete divide download draw export extract"
    " fetch fix free give install leave list load look make mend merge move name pack pip prepare put raise"
    " read remove rename repair resume run save say see set stack start submit take torch try type unpack use"
    " wait write".split()
)
# Words that make a reader stop, and what to say instead.
BANNED = {
    r"\bgo(es)? on with\b": "resume",
    r"\bpass(es|ed)? over\b": "skip",
    r"(?<!there )(?<!it )\b(is|are) no (?!longer\b|such\b|more\b)": "is not a",
    r"\bsee to\b": "check",
    r"\bto be had\b": "cannot be found",
    r"\bof then\b": "as before",
    r"\bof before\b": "older",
    r"\bgoes with\b": "needs",
    r"\bgo(es)? together\b": "can be used with",
    r"\blikewise\b": "too",
    r"\bup to you\b": "say what to do",
    r"\bnobody but\b": "only",
    r"\bbut by\b": "only by",
    r"\bthe (former|latter)\b": "name it",
    r"\bhas not\b(?! \w+ed)": "lacks",
    r"\bwhole\?": "complete?",
    r"\bnone is\b(?! overwritten)": "say what is missing",
    r"\b(shard_rows|(weights|keys|images)_digest)\b": "the option, or words",
}


def ways(node, constants):
    """Return every way to read a text of the syntax tree, by its conditions. VALUE stands for what is filled in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if isinstance(node, ast.FormattedValue):
        return ways(node.value, constants)
    if isinstance(node, ast.JoinedStr | ast.BinOp):
        parts = node.values if isinstance(node, ast.JoinedStr) else [node.left, node.right]
        if isinstance(node, ast.BinOp) and not isinstance(node.op, ast.Add):
            return [VALUE]
        each = [ways(part, constants) for part in parts]
        return ["".join(one) for one in itertools.islice(itertools.product(*each), MOST_WAYS)]
    if isinstance(node, ast.IfExp):
        return ways(node.body, constants) + ways(node.orelse, constants)
    if isinstance(node, ast.BoolOp) and isinstance(node.op, ast.Or):
        return [text for value in node.values for text in ways(value, constants)]
    if isinstance(node, ast.Name) and node.id in constants:
        return [constants[node.id]]
    if isinstance(node, ast.Call) and called(node) == "did_you_mean":
        return ["did you mean it?", *(ways(node.args[1], constants) if len(node.args) > 1 else [])]
    return [VALUE]


def called(node):
    return node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")


def found_in(tree, constants):
    """Yield (kind, line, text) of every error, hint and warning in the source of a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            arguments = {"error": node.args[:1], "hint": node.args[1:2]} if ERROR.fullmatch(called(node)) else {}
            if called(node) == "Other":
                arguments = {"hint": node.args[1:2]}
            if called(node) in ("report", "_report") and node.args and ast.unparse(node.args[0]) == "'warning'":
                arguments = {"error": [one.value for one in node.keywords if one.arg == "text"]}
            for kind, values in arguments.items():
                yield from ((kind, node.lineno, text) for value in values for text in ways(value, constants))
        elif isinstance(node, ast.Assign) and "hint" in ast.unparse(node.targets[0]).lower():
            values = node.value.values if isinstance(node.value, ast.Dict) else [node.value]
            yield from (("hint", node.lineno, text) for value in values for text in ways(value, constants))


@pytest.fixture(scope="module")
def said():
    """Return (kind, place, text) of every error, hint and warning of the package."""
    trees = {path: ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}
    constants = {}
    for tree in trees.values():
        for node in tree.body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant | ast.JoinedStr):
                texts = ways(node.value, constants)
                constants.update((target.id, texts[0]) for target in node.targets if isinstance(target, ast.Name))
    return [
        (kind, f"{path.relative_to(PACKAGE)}:{line}", text)
        for path, tree in trees.items()
        for kind, line, text in found_in(tree, constants)
    ]


def faults(kind, text):
    """Return what is wrong with the wording of an error, a hint or a help text."""
    if not re.search(r"[a-z]{2}", text.replace("did you mean it?", "")):
        return []  # all of it is made elsewhere
    wrong = [f"{found[0]!r}: say {better!r}" for word, better in BANNED.items() if (found := re.search(word, text))]
    words = re.findall(r"[\w'-]+", text)
    if kind == "help":
        wrong += [] if re.match(r"[A-Z]", text) else ["begins without a capital"]
        return wrong + ([] if text.endswith(".") else ["ends without a full stop"])
    if re.match(r"[A-Z][a-z]*\b(?!\()", text):
        wrong.append("begins with a capital, though it follows a colon")
    if re.search(r"(?<![. ])\.$", text):  # unlike `first ...` or `tar -cf x.tar .`
        wrong.append("ends in a full stop")
    is_quoted = re.search(rf"[:(] ?{VALUE}+\)?$", text) is not None  # words of another program end it
    is_sentence = any(word in VERBS for word in words) or (kind == "hint" and words and words[0] in ORDERS)
    if not (is_sentence or is_quoted or text.startswith("did you mean")):
        wrong.append("has no verb")
    if kind == "hint" and not _says_what_to_do(text, words):
        wrong.append("does not say what to do")
    return wrong


def _says_what_to_do(text, words):
    """Return whether a hint orders, asks, or states what an option or a command does that it names."""
    asks = text.rstrip().endswith("?") or re.match(r"(is|are|was|did|do|does) ", text)
    orders = any(word in ORDERS for word in words) or text.startswith(VALUE)
    names = re.search(r"(?<!\w)--?[a-z]|\bfeatcli\b|\bcommand\b", text)
    return bool(asks or orders or names)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("error", "image '…': not a number"),
        ("error", "no such folder"),
        ("error", "Cannot read '…': it is gone"),
        ("error", "dump '…' is gone."),
        ("error", "5 is no picture"),
        ("error", "shard_rows is 4 there"),
        ("error", "--seed goes with --random-init"),
        ("hint", "another -o"),
        ("hint", "the path of it"),
        ("hint", "Give another folder"),
        ("hint", "see to the disk"),
        ("hint", "the folder is another"),
        ("hint", "give the options of then"),
        ("hint", "is it whole?"),
        ("help", "of the random weights."),
        ("help", "Seed of the random weights"),
        ("help", "Go on with what is there: it goes on with the dump."),
        ("help", "Files that are passed over."),
    ],
)
def test_bad_wording_is_found(kind, text):
    """The rules reject fragments, capitals, full stops and words that make a reader stop."""
    assert faults(kind, text) != []


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("error", "input '…': there is no such file or folder"),
        ("error", "--batch-size must be at least 1, not …"),
        ("error", "checkpoint …: …"),
        ("error", "MaskFormer holds no backbone"),
        ("hint", "give --overwrite, or another -o"),
        ("hint", "is the path right?"),
        ("hint", "pip install 'featcli[ray]'"),
        ("hint", "did you mean …?"),
        ("help", "Number from which random weights are drawn. Default: 0."),
    ],
)
def test_good_wording_passes(kind, text):
    """Plain sentences break no rule."""
    assert faults(kind, text) == []


def test_errors_hints_and_warnings(said):
    """Each message is a sentence that can be read by itself, and each hint says what to do."""
    kinds = [kind for kind, _, _ in said]
    assert min(kinds.count("error"), kinds.count("hint")) > 300  # the search still finds them
    wrong = [f"{place} {kind}: {text!r}: {fault}" for kind, place, text in said for fault in faults(kind, text)]
    assert "\n".join(wrong) == ""


def test_what_is_said_of_pictures():
    """The lines about what a default did to pictures are sentences, whatever the option says."""
    rules = [PixelSpec(), PixelSpec(alpha="white", orientation="ignore", colour="convert", depth_range="0:9")]
    texts = [text for one in rules for count in (1, 2) for text in lines(dict.fromkeys(TRAITS, count), 2, one)]
    assert len(texts) == 4 * len(TRAITS)
    assert [(text, faults("error", text)) for text in texts if faults("error", text)] == []


@of_each_command
def test_help_of_options(name):
    """The help text of each option can be read without the option's name."""
    texts = [one.option.help for one in options_of(COMMANDS[name])]
    assert [(text, faults("help", text)) for text in texts if faults("help", text)] == []


@of_each_command
def test_help_fits_a_terminal(cli, name):
    """No line of a help is wider than 80 columns, or has a word that makes a reader stop."""
    lines_of_help = [line for command in ((), (name,)) for line in cli(*command, "--help").out.splitlines()]
    assert [line for line in lines_of_help if len(line) > WIDTH] == []
    assert [word for word in BANNED for line in lines_of_help if re.search(word, line)] == []


def test_exit_codes():
    """The tables of exit codes have no word that makes a reader stop."""
    texts = [text for code in EXIT_CODES for text in (code.means, code.to_do, code.again)]
    assert [(word, text) for word in BANNED for text in texts if re.search(word, text)] == []
