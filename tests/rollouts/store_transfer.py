"""A backend of vLLM's weight transfer for machines without a GPU, in the manner of its NCCL one:
weights go through the TCP store that NCCL uses to find itself. vLLM's processes load it as any
plugin; `install` says how.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from vllm.distributed.utils import StatelessProcessGroup
from vllm.distributed.weight_transfer import (
    WeightTransferEngineFactory,
    WeightTransferTrainerFactory,
)
from vllm.distributed.weight_transfer.base import (
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

NAME = "store"


@dataclass
class Info(WeightTransferInitInfo):
    master_address: str
    master_port: int
    rank_offset: int
    world_size: int


@dataclass
class Update(WeightTransferUpdateInfo):
    count: int


@dataclass
class TrainerInfo(TrainerInitInfo):
    backend: ClassVar[str] = NAME
    master_address: str
    master_port: int
    world_size: int


class Receiver(WeightTransferEngine[Info, Update]):
    init_info_cls, update_info_cls = Info, Update

    def init_transfer_engine(self, init_info: Info) -> None:
        rank = init_info.rank_offset + self.parallel_config.rank
        self.group = StatelessProcessGroup.create(
            init_info.master_address, init_info.master_port, rank, init_info.world_size
        )

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: Update) -> None:
        model: Any = self.model
        for _ in range(update_info.count):
            model.load_weights([self.group.broadcast_obj(None, 0)])

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        pass


class Sender(TrainerWeightTransferEngine[TrainerInfo]):
    init_info_cls = TrainerInfo
    group: StatelessProcessGroup

    @classmethod
    def trainer_init(cls, init_info: TrainerInfo, *, client: Any, source: Any = None) -> Any:
        sender = cls(client=client, source=source)
        told = {k: v for k, v in asdict(init_info).items() if k != "rank"}
        with ThreadPoolExecutor(1) as thread:
            joining = thread.submit(client.init_weight_transfer_engine, told | {"rank_offset": 1})
            sender.group = StatelessProcessGroup.create(
                init_info.master_address, init_info.master_port, 0, init_info.world_size
            )
            joining.result()
        return sender

    def send_weights(self) -> None:
        assert self.source is not None
        self.client.start_weight_update()
        with ThreadPoolExecutor(1) as thread:
            count = len(self.source.metadata())
            receiving = thread.submit(self.client.update_weights, {"count": count})
            for name, value in self.source:
                self.group.broadcast_obj((name, torch.clone(value)), 0)
            receiving.result()
        self.client.finish_weight_update()


def register() -> None:
    """What the entry point calls in each of vLLM's processes."""
    WeightTransferEngineFactory.register_engine(NAME, Receiver)
    WeightTransferTrainerFactory.register_engine(NAME, Sender)


def install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this an installed plugin for processes that start from now on, and known in this one."""
    entry = folder / "store_transfer-1.dist-info"
    entry.mkdir(parents=True)
    (entry / "METADATA").write_text("Metadata-Version: 2.1\nName: store-transfer\nVersion: 1\n")
    (entry / "entry_points.txt").write_text(
        f"[vllm.general_plugins]\nstore = {__name__}:register\n"
    )
    root = Path(__file__).parents[2]
    monkeypatch.setenv("PYTHONPATH", ":".join(map(str, [folder, root])))
    if NAME not in WeightTransferEngineFactory._registry:
        register()
