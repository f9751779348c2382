"""The I/O layer: the only code that uses foreign names and layouts.

    base_model     open_base, load_base: safetensors directories, GGUF files, models of the hub
    peft           save_adapter, load_adapter
    run_state      save_run, latest_run, load_run: checkpoints that survive kill -9
    bitsandbytes   write_quantized: a 4-bit checkpoint in bitsandbytes' format
    merged         Merged, write_merged: base and adapter as one model
    atomic         atomic writes of files and directories
    output_lock    one process at a time writes a directory

README.md in this directory documents the formats. Import from the module you need: reading a run's
state should not import transformers.
"""
