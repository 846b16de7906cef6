"""The image store as a driver sees it."""

from pathlib import Path

from carrel import paths
from carrel.errors import CarrelError, NodeFaultError
from carrel.images.kernel import ensure_kernel, kernels
from carrel.images.store import Store
from carrel.model.image import ImageFiles, KernelFiles


class StoreImages:
    """Implements ``ports.ImageSource`` on a store of this host."""

    def __init__(self, store: Path) -> None:
        """Look at nothing yet."""
        self._path = store
        self._kernel: KernelFiles | None = None
        self._made_of: tuple[object, ...] = ()

    def files(self, name: str) -> ImageFiles:
        store = Store(self._path)
        image = store.resolve(name)
        return ImageFiles(
            hash=image.hash,
            name=image.name,
            root=store.root_disk(image),
            filesystem=image.filesystem,
            has_shell=bool(image.shell),
        )

    def kernel(self) -> KernelFiles:
        """Return kernel and initramfs; a rebuilt agent or a newer kernel is in the next guest."""
        agent = paths.libexec() / "carrel-agent"
        try:
            made_of = self._parts(agent)
            if self._kernel is None or made_of != self._made_of or not self._kernel.initramfs.exists():
                found = ensure_kernel(self._path, agent=agent, progress=lambda _: None)
                self._made_of = made_of
                self._kernel = KernelFiles(
                    version=found.version, kernel=found.vmlinux, initramfs=found.initramfs, id=found.id
                )
        except CarrelError as error:
            raise NodeFaultError(f"no kernel for guests: {error}") from error
        except OSError as error:
            raise NodeFaultError(f"no kernel for guests: {error}; see: carrel image build") from error
        return self._kernel

    def _parts(self, agent: Path) -> tuple[object, ...]:
        """Return what tells cheaply that an input changed; an agent that is absent is for ``ensure_kernel`` to say."""
        facts = agent.stat() if agent.exists() else None
        return (facts and (facts.st_ino, facts.st_mtime_ns, facts.st_size), kernels(self._path)[-1:])
