"""Train with ms-swift, and measure it: python with_swift.py OPTIONS, a JSON object."""

import json
import sys
from pathlib import Path
from typing import Any

from measuring import Timer
from swift import sft_main
from swift.callbacks import callbacks_map

OPTIONS = json.loads(sys.argv[1])


class SwiftTimer(Timer):
    def __init__(self, args: Any, trainer: Any) -> None:
        """Take what ms-swift gives its callbacks."""
        super().__init__(Path(OPTIONS["result"]))
        self.trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        lengths = self.trainer.train_dataset.dataset["lengths"]
        self.facts["tokens"] = sum(sum(one) if isinstance(one, list) else one for one in lengths)
        super().on_train_begin(*args, **kwargs)


def main() -> None:
    callbacks_map["timer"] = SwiftTimer
    settings = {
        "model": OPTIONS["model"],
        "model_type": "llama",
        "template": "chatml",
        "dataset": OPTIONS["messages"],
        "max_length": str(OPTIONS["max_length"]),
        "strict": "true",  # a row that is longer is an error, not left out
        "tuner_type": "full",
        "torch_dtype": "float32",
        "fp16": "false",
        "bf16": "false",
        "use_cpu": "true",
        "attn_impl": "sdpa",
        "gradient_checkpointing": "false",
        "per_device_train_batch_size": "1",
        "gradient_accumulation_steps": str(OPTIONS["batch_size"]),
        "num_train_epochs": "1",
        "save_strategy": "no",
        "report_to": "none",
        "check_model": "false",
        "seed": str(OPTIONS["seed"]),
        "output_dir": OPTIONS["output"],
        "callbacks": "timer",
    }
    sft_main([word for name, value in settings.items() for word in (f"--{name}", value)])


if __name__ == "__main__":
    main()
