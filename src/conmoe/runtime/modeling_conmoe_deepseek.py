"""The consolidated form of DeepSeekMoE; apart from the other families because its stock classes are files of ours."""

from .modeling_conmoe import consolidated
from .modeling_deepseek import DeepseekConfig, DeepseekForCausalLM, DeepseekModel

ConmoeDeepseekConfig = consolidated(DeepseekConfig, __name__)
ConmoeDeepseekModel = consolidated(DeepseekModel, __name__)
ConmoeDeepseekForCausalLM = consolidated(DeepseekForCausalLM, __name__)
