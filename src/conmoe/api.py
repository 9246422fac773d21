"""The public functions and types, which are those of the package itself, and what Transformers is taught."""

# A package that is imported later would take the place of a function of its name.
import conmoe.budgets
import conmoe.methods
import conmoe.refinements
import conmoe.statistics  # noqa: F401
from conmoe import __version__
from conmoe.apply import Applied, apply
from conmoe.artifacts import read_manifest, read_plan, write_json
from conmoe.bench import bench
from conmoe.calibrate import Calibration, calibrate, merge_statistics
from conmoe.candidates import Candidate, parse_candidates
from conmoe.compress import Result, calibration_documents, check, compress
from conmoe.data import DataSpec, TokenData, load_tokenizer, load_tokens, parse_spec
from conmoe.demo import PROMPT as DEMO_PROMPT
from conmoe.demo import Demo, demo
from conmoe.dequantise import Dequantised, dequantise
from conmoe.diagnosis import Diagnosis
from conmoe.doctor import doctor
from conmoe.effort import EFFORTS, Effort, settle
from conmoe.evaluate import (
    Fidelity,
    GenerationOptions,
    Measured,
    SpeedOptions,
    TaskOptions,
    Tasks,
    cut_prompts,
    evaluate,
    evaluate_generation,
    evaluate_speed,
    evaluate_tasks,
    load_tasks,
    read_prompts,
)
from conmoe.generate import generate
from conmoe.hub import Pushed, Upload, check_push, push, push_command
from conmoe.hub import prepare as prepare_push
from conmoe.inspect import Inspection, inspect
from conmoe.locate import locate
from conmoe.plan import plan
from conmoe.registry import budgets, methods, refinements, statistics
from conmoe.report.write import headline, verdict, write_report
from conmoe.request import Request
from conmoe.results import Bench, load_bench
from conmoe.runtime import register as _register
from conmoe.selftext import write_text
from conmoe.slicing import Sliced, slice_plan
from conmoe.tune import Tuned, Tuning, tune
from conmoe.types import ConmoeError, UsageError
from conmoe.verify import verify

_register()

__all__ = [
    "DEMO_PROMPT",
    "EFFORTS",
    "Applied",
    "Bench",
    "Calibration",
    "Candidate",
    "ConmoeError",
    "DataSpec",
    "Demo",
    "Dequantised",
    "Diagnosis",
    "Effort",
    "Fidelity",
    "GenerationOptions",
    "Inspection",
    "Measured",
    "Pushed",
    "Request",
    "Result",
    "Sliced",
    "SpeedOptions",
    "TaskOptions",
    "Tasks",
    "TokenData",
    "Tuned",
    "Tuning",
    "Upload",
    "UsageError",
    "__version__",
    "apply",
    "bench",
    "budgets",
    "calibrate",
    "calibration_documents",
    "check",
    "check_push",
    "compress",
    "cut_prompts",
    "demo",
    "dequantise",
    "doctor",
    "evaluate",
    "evaluate_generation",
    "evaluate_speed",
    "evaluate_tasks",
    "generate",
    "headline",
    "inspect",
    "load_bench",
    "load_tasks",
    "load_tokenizer",
    "load_tokens",
    "locate",
    "merge_statistics",
    "methods",
    "parse_candidates",
    "parse_spec",
    "plan",
    "prepare_push",
    "push",
    "push_command",
    "read_manifest",
    "read_plan",
    "read_prompts",
    "refinements",
    "settle",
    "slice_plan",
    "statistics",
    "tune",
    "verdict",
    "verify",
    "write_json",
    "write_report",
    "write_text",
]
