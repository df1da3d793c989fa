"""The other half of carry.py: scores a text with a run's artifact twice, at once and id by id.

    python scripts/carry_worker.py FOLDER SHARD COUNT     prints {"score": [nats, ...], "stream": [nats, ...]}

FOLDER holds train_gpt.py and run/artifact.bin. Of the script it uses `load`, `score` and `stream`, which
every script of the family has. It is a process of its own, since importing a script may change torch's
settings.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from family import load_script


def main(folder: Path, shard: Path, count: int) -> dict[str, list[float]]:
    import numpy as np
    import torch

    script = load_script(folder / "train_gpt.py")
    ids = np.fromfile(shard, "<u2", offset=1024, count=count).astype(np.int64)
    found = {}

    def model():
        torch.manual_seed(0)
        made = script.load(str(folder / "run" / "artifact.bin"), "cpu")
        if tokenizers := sorted(shard.parent.glob("*.model")):  # a mixture over pieces asks what they spell
            made.args.tokenizer_path = str(tokenizers[0])
        return made

    found["score"] = script.score(model(), ids)[0].tolist()
    reader, found["stream"] = script.stream(model()), []
    reader.push(int(ids[0]))
    for target in ids[1:]:
        found["stream"].append(-float(reader.logprobs()[target]))
        reader.push(int(target))
    return found


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))))
