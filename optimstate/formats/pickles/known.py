"""Classes and functions that build data and nothing else, by their exact names.

A name is listed if calling it with any arguments, and giving the result any state, can neither run code chosen by the
file's author nor access a file, a process or the network. Nested classes are listed with their full names; no other
dotted name is known.
"""

from __future__ import annotations

from optimstate.formats.pickles.tensors import READ, STORAGE_OF_TENSOR
from optimstate.tensors.dtypes import DTYPES

__all__ = ["DATA", "INSTANCES"]


def _names(table: str) -> set[str]:
    """The full names in a table with lines `module: name name ...`."""
    lines = (line.partition(": ") for line in table.splitlines() if line.strip())
    return {f"{module.strip()}.{name}" for module, _, names in lines for name in names.split()}


_PYTHON = """
    _codecs: encode
    argparse: Namespace
    collections: Counter OrderedDict defaultdict deque
    copyreg: __newobj__ _reconstructor
    copy_reg: __newobj__ _reconstructor
    datetime: date datetime time timedelta timezone
    decimal: Decimal
    fractions: Fraction
    pathlib: Path PosixPath PurePath PurePosixPath PureWindowsPath WindowsPath
    pathlib._local: Path PosixPath PurePath PurePosixPath PureWindowsPath WindowsPath
    uuid: UUID
"""
_BUILTINS = """
    Ellipsis NotImplemented bool bytearray bytes complex dict float frozenset int list object set slice str tuple
"""
_NUMPY = """
    numpy: bool bool_ dtype float16 float32 float64 int16 int32 int64 int8 ndarray uint16 uint32 uint64 uint8
    numpy.core.multiarray: _reconstruct scalar
    numpy._core.multiarray: _reconstruct scalar
    numpy.core.numeric: _frombuffer
    numpy._core.numeric: _frombuffer
    numpy.dtypes: BoolDType Float16DType Float32DType Float64DType Int16DType Int32DType Int64DType Int8DType
    numpy.dtypes: UInt16DType
    numpy.dtypes: UInt32DType UInt64DType UInt8DType
    numpy.random._mt19937: MT19937
    numpy.random._pcg64: PCG64 PCG64DXSM
    numpy.random._philox: Philox
    numpy.random._sfc64: SFC64
    numpy.random._pickle: __bit_generator_ctor __generator_ctor __randomstate_ctor
    numpy.random.bit_generator: SeedSequence __pyx_unpickle_SeedSequence
"""
_TORCH = """
    torch: Size Tensor device memory_format layout
    torch._tensor: Tensor _rebuild_from_type _rebuild_from_type_v2
    torch._utils: _rebuild_device_tensor_from_cpu_tensor _rebuild_device_tensor_from_numpy
    torch._utils: _rebuild_meta_tensor_no_storage
    torch._utils: _rebuild_nested_tensor _rebuild_parameter _rebuild_parameter_with_state _rebuild_qtensor
    torch._utils: _rebuild_sparse_csr_tensor _rebuild_sparse_tensor _rebuild_tensor _rebuild_tensor_v2
    torch._utils: _rebuild_tensor_v3
    torch._utils: _rebuild_wrapper_subclass _rebuild_xla_tensor
    torch.nn.parameter: Buffer Parameter UninitializedBuffer UninitializedParameter
    torch.serialization: _get_layout
    torch.storage: TypedStorage UntypedStorage _LegacyStorage
    torch.torch_version: TorchVersion
    torch.distributed._mesh_layout: _FlatLayout _MeshLayout
    torch.distributed._shard.metadata: ShardMetadata
    torch.distributed._shard.sharded_tensor.api: ShardedTensor ShardedTensor.ProcessGroupState
    torch.distributed._shard.sharded_tensor.metadata: MEM_FORMAT_ENCODING ShardedTensorMetadata TensorProperties
    torch.distributed._shard.sharded_tensor.shard: Shard
    torch.distributed._shard.sharding_spec.api: EnumerableShardingSpec
    torch.distributed._shard.sharding_spec.chunk_sharding_spec: ChunkShardingSpec
    torch.distributed.remote_device: _remote_device
    torch.distributed.checkpoint.filesystem: _StorageInfo _StoragePrefix
    torch.distributed.checkpoint.metadata: BytesStorageMetadata ChunkStorageMetadata Metadata MetadataIndex StorageMeta
    torch.distributed.checkpoint.metadata: TensorProperties TensorStorageMetadata _MEM_FORMAT_ENCODING
    torch.distributed.checkpoint.planner: SavePlan TensorWriteData WriteItem WriteItemType
    torch.distributed._tensor.api: DTensor
    torch.distributed._tensor.placement_types: DTensorSpec Partial Replicate Shard TensorMeta _Partial
    torch.distributed.device_mesh: DeviceMesh
    torch.distributed.tensor: DTensor
    torch.distributed.tensor._api: DTensor
    torch.distributed.tensor._dtensor_spec: DTensorSpec ShardOrderEntry TensorMeta
    torch.distributed.tensor.placement_types: Partial Replicate Shard _StridedShard
"""
_TORCH_OPTIM = """
    torch.optim._adafactor: Adafactor
    torch.optim._muon: Muon
    torch.optim.adadelta: Adadelta
    torch.optim.adagrad: Adagrad
    torch.optim.adam: Adam
    torch.optim.adamax: Adamax
    torch.optim.adamw: AdamW
    torch.optim.asgd: ASGD
    torch.optim.lbfgs: LBFGS
    torch.optim.nadam: NAdam
    torch.optim.radam: RAdam
    torch.optim.rmsprop: RMSprop
    torch.optim.rprop: Rprop
    torch.optim.sgd: SGD
    torch.optim.sparse_adam: SparseAdam
    torch.optim.lr_scheduler: ChainedScheduler ConstantLR CosineAnnealingLR CosineAnnealingWarmRestarts CyclicLR
    torch.optim.lr_scheduler: ExponentialLR LRScheduler LinearLR MultiStepLR OneCycleLR PolynomialLR ReduceLROnPlateau
    torch.optim.lr_scheduler: SequentialLR StepLR _LRScheduler
"""
_TORCH_NN = """
    torch.nn.modules.activation: CELU ELU GELU GLU Hardshrink Hardsigmoid Hardswish Hardtanh LeakyReLU LogSigmoid
    torch.nn.modules.activation: LogSoftmax Mish MultiheadAttention PReLU RReLU ReLU ReLU6 SELU SiLU Sigmoid Softmax
    torch.nn.modules.activation: Softmax2d Softmin Softplus Softshrink Softsign Tanh Tanhshrink Threshold
    torch.nn.modules.batchnorm: BatchNorm1d BatchNorm2d BatchNorm3d SyncBatchNorm
    torch.nn.modules.container: ModuleDict ModuleList ParameterDict ParameterList Sequential
    torch.nn.modules.conv: Conv1d Conv2d Conv3d ConvTranspose1d ConvTranspose2d ConvTranspose3d
    torch.nn.modules.dropout: AlphaDropout Dropout Dropout1d Dropout2d Dropout3d FeatureAlphaDropout
    torch.nn.modules.flatten: Flatten Unflatten
    torch.nn.modules.instancenorm: InstanceNorm1d InstanceNorm2d InstanceNorm3d
    torch.nn.modules.linear: Bilinear Identity Linear NonDynamicallyQuantizableLinear
    torch.nn.modules.normalization: CrossMapLRN2d GroupNorm LayerNorm LocalResponseNorm RMSNorm
    torch.nn.modules.padding: ConstantPad1d ConstantPad2d ConstantPad3d ReflectionPad1d ReflectionPad2d ReflectionPad3d
    torch.nn.modules.padding: ReplicationPad1d ReplicationPad2d ReplicationPad3d ZeroPad1d ZeroPad2d ZeroPad3d
    torch.nn.modules.pixelshuffle: PixelShuffle PixelUnshuffle
    torch.nn.modules.pooling: AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d AdaptiveMaxPool1d AdaptiveMaxPool2d
    torch.nn.modules.pooling: AdaptiveMaxPool3d AvgPool1d AvgPool2d AvgPool3d LPPool1d LPPool2d LPPool3d MaxPool1d
    torch.nn.modules.pooling: MaxPool2d MaxPool3d MaxUnpool1d MaxUnpool2d MaxUnpool3d
    torch.nn.modules.rnn: GRU GRUCell LSTM LSTMCell RNN RNNCell
    torch.nn.modules.sparse: Embedding EmbeddingBag
    torch.nn.modules.transformer: Transformer TransformerDecoder TransformerDecoderLayer TransformerEncoder
    torch.nn.modules.transformer: TransformerEncoderLayer
    torch.nn.modules.upsampling: Upsample UpsamplingBilinear2d UpsamplingNearest2d
"""
# Enumerations, dataclasses and modules of the frameworks whose checkpoints hold them.
_FRAMEWORKS = """
    accelerate.utils.dataclasses: DistributedType
    bitsandbytes.functional: QuantState
    bitsandbytes.nn.modules: Int8Params Linear4bit Linear8bitLt LinearFP4 LinearNF4 Params4bit
    deepspeed.checkpoint.universal_checkpoint: SubparamShape
    deepspeed.runtime.fp16.loss_scaler: DynamicLossScaler LossScaler
    deepspeed.runtime.zero.config: ZeroStageEnum
    deepspeed.utils.tensor_fragment: fragment_address
    fastcore.foundation: L
    gymnasium.spaces.box: Box
    gymnasium.spaces.dict: Dict
    gymnasium.spaces.discrete: Discrete
    gymnasium.spaces.multi_binary: MultiBinary
    gymnasium.spaces.multi_discrete: MultiDiscrete
    gymnasium.spaces.tuple: Tuple
    lightning.fabric.utilities.data: AttributeDict
    lightning_fabric.utilities.data: AttributeDict
    mmengine.config.config: ConfigDict
    mmengine.logging.history_buffer: HistoryBuffer HistoryBuffer.current HistoryBuffer.max HistoryBuffer.mean
    mmengine.logging.history_buffer: HistoryBuffer.min
    omegaconf.base: ContainerMetadata Metadata
    omegaconf.dictconfig: DictConfig
    omegaconf.listconfig: ListConfig
    omegaconf.nodes: AnyNode BooleanNode FloatNode IntegerNode StringNode
    pytorch_lightning.utilities.parsing: AttributeDict
    stable_baselines3.common.utils: ConstantSchedule FloatSchedule LinearSchedule
    torchao.optim.subclass_4bit: OptimState4bit
    torchao.optim.subclass_8bit: OptimState8bit
    torchao.optim.subclass_fp8: OptimStateFp8
    transformers.trainer_pt_utils: AcceleratorConfig
    transformers.trainer_utils: FSDPOption HubStrategy IntervalStrategy SaveStrategy SchedulerType
    transformers.training_args: OptimizerNames
"""
# Classes whose `__init__` opens files, processes or connections, or calls its arguments: instances made without a call
# and filled with state are data, a call is not.
_INSTANCES = """
    accelerate.state: PartialState
    stable_baselines3.common.buffers: DictRolloutBuffer ReplayBuffer RolloutBuffer
    stable_baselines3.common.policies: ActorCriticPolicy MultiInputActorCriticPolicy
    transformers.training_args: TrainingArguments
    transformers.training_args_seq2seq: Seq2SeqTrainingArguments
"""

INSTANCES = frozenset(_names(_INSTANCES))
"""The full names of classes that are data as long as they are not called."""

DATA = frozenset(
    _names(_PYTHON + _NUMPY + _TORCH + _TORCH_OPTIM + _TORCH_NN + _FRAMEWORKS)
    | {f"{module}.{name}" for module in ("builtins", "__builtin__") for name in _BUILTINS.split()}
    | {*READ, *STORAGE_OF_TENSOR}
    | {"__builtin__.long", "__builtin__.unicode", "torch.nn.modules.module.Module"}
    | {"torch." + name for name in DTYPES}
    | {f"torch._utils.torch.{name}" for name in ("channels_last", "channels_last_3d", "contiguous_format")}
    | {"torch._utils.torch.preserve_format"}  # since protocol 4, which finds `torch` as an attribute of the module
    | {f"{module}.{row.storage}" for module in ("torch", "torch.cuda") for row in DTYPES.values() if row.storage}
    | {"torch." + name for name in ("quint8", "qint8", "qint32", "quint4x2", "quint2x4")}
    | {"torch." + name for name in ("QUInt8Storage", "QInt8Storage", "QInt32Storage", "QUInt4x2Storage")}
)
"""The full names of classes and functions that only build data."""
