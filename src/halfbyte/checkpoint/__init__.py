"""The I/O layer: the only code that knows foreign names and layouts.

    base_model     open_base, load_base: safetensors directories, GGUF files, models of the hub
    peft           save_adapter, load_adapter
    run_state      save_run, latest_run, load_run: checkpoints that survive kill -9
    bitsandbytes   write_quantized: a 4-bit checkpoint for everyone
    merged         Merged, write_merged: base and adapter as one model
    atomic         files and directories that are there whole or not at all

README.md beside this file has the byte tables. Import what you need from the module that has it:
reading a run's state should not load transformers.
"""
