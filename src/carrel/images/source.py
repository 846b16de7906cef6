"""The image store as a driver sees it."""

from pathlib import Path

from carrel import paths
from carrel.errors import CarrelError, NodeFaultError
from carrel.images.kernel import ensure_kernel
from carrel.images.store import Store
from carrel.model.image import ImageFiles, KernelFiles


class StoreImages:
    """Implements ``ports.ImageSource`` on a store of this host."""

    def __init__(self, store: Path) -> None:
        """Look at nothing yet."""
        self._path = store
        self._kernel: KernelFiles | None = None

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
        if self._kernel is None:
            try:
                found = ensure_kernel(self._path, agent=paths.libexec() / "carrel-agent", progress=lambda _: None)
            except (CarrelError, OSError) as error:
                raise NodeFaultError(f"no kernel for guests: {error}; see: carrel image build") from error
            self._kernel = KernelFiles(
                version=found.version, kernel=found.vmlinux, initramfs=found.initramfs, id=found.id
            )
        return self._kernel
