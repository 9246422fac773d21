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
from conmoe.diagnosis import Diagnosis
from conmoe.doctor import doctor
from conmoe.effort import EFFORTS, Effort, settle
from conmoe.evaluate import Fidelity, Measured, evaluate
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
    "Diagnosis",
    "Effort",
    "Fidelity",
    "Inspection",
    "Measured",
    "Pushed",
    "Request",
    "Result",
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
    "demo",
    "doctor",
    "evaluate",
    "generate",
    "headline",
    "inspect",
    "load_bench",
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
    "refinements",
    "settle",
    "statistics",
    "tune",
    "verdict",
    "verify",
    "write_json",
    "write_report",
    "write_text",
]
