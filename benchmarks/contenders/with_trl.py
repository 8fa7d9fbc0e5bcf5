"""Train with TRL's SFTTrainer, and measure it: python with_trl.py OPTIONS, a JSON object."""

import json
import sys
from pathlib import Path

import datasets
from measuring import Timer
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer


def main() -> None:
    options = json.loads(sys.argv[1])
    datasets.disable_caching()
    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(options["model"])
    tokenizer.chat_template = Path(options["template"]).read_text()
    arguments = SFTConfig(
        output_dir=options["output"],
        assistant_only_loss=True,
        num_train_epochs=1,
        seed=options["seed"],
        save_strategy="no",
        report_to=[],
        **({"model_init_kwargs": {"dtype": "float32"}, "use_cpu": True, "bf16": False} | options["settings"]),
    )
    adapters = LoraConfig(task_type="CAUSAL_LM", **options["lora"]) if "lora" in options else None
    data = datasets.load_dataset("json", data_files=options["messages"], split="train", cache_dir=options["output"])
    trainer = SFTTrainer(
        options["model"], arguments, train_dataset=data, processing_class=tokenizer, peft_config=adapters
    )
    tokens = sum(map(len, trainer.train_dataset["input_ids"]))
    trainer.add_callback(Timer(Path(options["result"]), tokens=tokens))
    trainer.train()


if __name__ == "__main__":
    main()
