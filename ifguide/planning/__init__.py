"""What a run will take, before it is started: FLOP, hours, cost, storage and memory of every stage.

`measurements.yaml` and `ifguide/hardware.yaml` hold every figure that an estimate rests on, with its source;
nothing here asks a machine or Ray.
"""
