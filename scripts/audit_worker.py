"""The audited script's side of scripts/audit.py: runs it, or answers questions with it. Judges nothing.

    python -I audit_worker.py main SCRIPT                        the script as a program, watched
    python -I audit_worker.py serve SCRIPT ARTIFACT [ADAPTER]    JSON lines in, JSON lines out

It is copied into the folder of the trial and needs only the standard library and numpy. What it watches goes
to the file that AUDIT_WATCH names when the process ends: variables of the environment that the script's own
lines read, connections tried (and refused), processes started. A script that means to deceive can get round
all of this, since it runs in the same interpreter.

Questions: {"op": "score", "ids", "positions"} -> {"nats", "vectors": {t: log-probabilities}}; {"op":
"stream"} starts a fresh stream, {"op": "logprobs"} and {"op": "push", "id"} drive it. An answer {"error":
text} ends the session.
"""

import atexit
import importlib.util
import inspect
import json
import os
import runpy
import sys
import traceback

SEEN = {"environment": {}, "network": [], "processes": []}


def line_of(script: str) -> str:
    """`file:line` of the script that called, skipping the
    library's own wrappers; empty where another file did.
    """
    frame = sys._getframe(2)
    while frame and os.path.basename(frame.f_code.co_filename) in (
        "os.py",
        "_collections_abc.py",
        "<frozen os>",
        "<frozen _collections_abc>",
        os.path.basename(__file__),
    ):
        frame = frame.f_back
    while frame and frame.f_code.co_filename == "<string>":  # exec in the script
        frame = frame.f_back
    if frame and os.path.abspath(frame.f_code.co_filename) == script:
        return f"{os.path.basename(script)}:{frame.f_lineno}"
    return ""


def watch(script: str) -> None:
    """Notes what the script reads from here on; the notes are written when the process ends."""

    class Watched(type(os.environ)):
        def __getitem__(self, name):
            if where := line_of(script):
                SEEN["environment"].setdefault(where, []).append(str(name))
            return super().__getitem__(name)

        def __contains__(self, name):
            if where := line_of(script):
                SEEN["environment"].setdefault(where, []).append(str(name))
            return super().__contains__(name)

    def hook(event: str, arguments: tuple) -> None:
        if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
            address = arguments[1] if event == "socket.connect" else arguments[0]
            if event == "socket.connect" and not isinstance(address, tuple):
                return  # a Unix socket
            SEEN["network"].append(f"{event} {address}")
            raise PermissionError(f"no network in an audit: {event} {address}")
        elif event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn"):
            SEEN["processes"].append(os.fsdecode(arguments[0]) if arguments[0] else event)

    os.environ.__class__ = Watched
    sys.addaudithook(hook)
    out, write = os.environ["AUDIT_WATCH"], open
    atexit.register(lambda: write(out, "w").write(json.dumps(SEEN)))


def module_at(path: str, name: str, **given):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    vars(module).update(given)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def serve(script: str, artifact: str, adapter: str) -> None:
    """Answers until the input ends.

    The script's own prints go to stderr: the answers have a channel of their own.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.stdout = sys.stderr

    def answer(found: dict) -> None:
        answers.write(json.dumps(found) + "\n")
        answers.flush()

    stream = None
    try:
        if adapter:
            sys.path.insert(0, os.getcwd())
            module = module_at(adapter, "adapter", SCRIPT=script, ARTIFACT=artifact)
            score, fresh = module.score, getattr(module, "stream", None)
        else:
            module = module_at(script, "audited")

            def model():  # one that learns while it scores is loaded again for every question
                found = module.load(artifact, "cpu")
                if hasattr(
                    getattr(found, "args", None), "eval_batch_tokens"
                ):  # memory, not score: a short text pads a batch
                    found.args.eval_batch_tokens = int(
                        os.environ.get("EVAL_BATCH_TOKENS", found.args.eval_batch_tokens)
                    )
                if os.environ.get("TOKENIZER_PATH") and hasattr(
                    getattr(found, "args", None), "tokenizer_path"
                ):
                    found.args.tokenizer_path = os.environ["TOKENIZER_PATH"]  # what ids spell, for a mixture
                return found

            def score(ids, positions):
                return module.score(model(), ids, positions)

            def fresh(count):  # a script that cuts texts by their length is told it
                told = "length" in inspect.signature(module.stream).parameters
                return module.stream(model(), *[count][:told])

        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(1)
        answer({"ready": True, "stream": fresh is not None})
        for line in sys.stdin:
            question = json.loads(line)
            if question["op"] == "score":
                import numpy as np

                ids = np.array(question["ids"], np.int64)
                nats, vectors = score(ids, tuple(question["positions"]))
                answer(
                    {
                        "nats": np.asarray(nats, np.float64).tolist(),
                        "vectors": {str(t): np.asarray(v, np.float64).tolist() for t, v in vectors.items()},
                    }
                )
            elif question["op"] == "stream":
                stream = fresh() if adapter else fresh(question["ids"])
                answer({})
            elif question["op"] == "logprobs":
                answer({"logprobs": [float(value) for value in stream.logprobs()]})
            else:
                stream.push(question["id"])
                answer({})
    except BaseException as error:
        traceback.print_exc()
        answer({"error": f"{type(error).__name__}: {error}"})
        sys.exit(1)


def main() -> None:
    mode, script = sys.argv[1], os.path.abspath(sys.argv[2])
    watch(script)
    if mode == "serve":
        serve(script, sys.argv[3], sys.argv[4] if len(sys.argv) > 4 else "")
    else:
        sys.argv = [script, *sys.argv[3:]]
        runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
