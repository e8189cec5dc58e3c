"""Checkpoints as other formats, and back.

    open_source -> tensors_to_write (does it fit its own configuration?) -> convert (write beside, compare, rename)

Everything between two formats speaks our parameter names, shapes and types (`source.Source`), so a format is one module
that knows its own names, and no format knows another:

    native        native.py   iter_0000100/ of a run directory, written under any layout
    safetensors   flat.py     model.safetensors (or shards with an index) + config.json + checksums.json
    hf            hf/         folders of Hugging Face transformers
    megatron-deepspeed   megatron_deepspeed.py   a file per expert and per tensor-parallel rank

How to add a format: a module with

    looks_like(directory) -> bool                   for the message when somebody names the wrong format
    open_source(directory, iteration) -> Source     reads names and shapes only; ConfigError with all that is wrong
    write(selection, directory, ...)                asks `selection.read(names)` for each tensor exactly once
    SOURCE_OPTIONS, TARGET_OPTIONS                  flags of the tool that these two take beside
    losses(run, vocab_size, ...) -> [sentence]      if there are models that it cannot express: what of this one
    kept(run, vocab_size, tensors, ...) -> tensors  with losses: what is written all the same, with --allow-lossy
    RESUMES                                         whether `write` takes a journal, so that an interrupted conversion goes on
    stored_dtypes(source) -> {name: dtype}          if it has types of its own, when the user gives none

and a line in `convert.FORMATS`. Its name map stays inside that module. Where the other format cuts or turns what is one tensor
here (one matrix per expert, transposed), its source stacks the pieces in `read`, and its `write` cuts them: comparing,
counting, rounding and the tools never see the difference. Files of the safetensors format go through shards.py.
"""
