"""One rank's process: `build_engine` makes a `StepEngine`, whose `step` schedules, runs and samples one step.

`worker` runs it in a process of its own; `messages` defines what the frontend and the workers send each other.
"""
