//! The memory that a layer needs besides its tensors.

use framestride_shapes::workspace::{ALIGNMENT, WorkspaceLayout};

use crate::call::{check_address, range_at};
use crate::device::{Buffer, Device};
use crate::error::{Error, Result};

/// The one piece of device memory that a layer needs besides its tensors. All layers of a model may
/// use it in turn.
pub struct Workspace {
    device: Device,
    address: u64,
    bytes: u64,
    /// `None` for borrowed memory.
    owned: Option<Buffer>,
}

impl Workspace {
    /// Allocates a workspace of `bytes` bytes.
    pub fn allocate(device: &Device, bytes: u64) -> Result<Workspace> {
        let buffer = device.allocate(bytes)?;
        Ok(Workspace { device: device.clone(), address: buffer.address(), bytes, owned: Some(buffer) })
    }

    /// Borrows `bytes` bytes of memory of `device` at `address`, a multiple of 256. They are never
    /// freed.
    ///
    /// Size and alignment are checked at each call.
    ///
    /// # Safety
    /// The range is memory of `device` for as long as this value lives, and holds nothing that
    /// anybody else needs.
    #[must_use]
    pub unsafe fn borrow(device: &Device, address: u64, bytes: u64) -> Workspace {
        Workspace { device: device.clone(), address, bytes, owned: None }
    }

    /// Address of the first byte.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.address
    }

    /// The allocation, when this value owns it.
    #[doc(hidden)]
    #[must_use]
    pub fn buffer(&self) -> Option<&Buffer> {
        self.owned.as_ref()
    }

    /// Checks that this is memory of `device`, and large enough for the layout.
    pub(crate) fn check(&self, device: &Device, layout: &WorkspaceLayout) -> Result<()> {
        if !self.device.is(device) {
            return Err(Error::input(
                "workspace",
                format!("memory of another device ({})", self.device.name()),
                format!("memory of the module's device ({})", device.name()),
                "Allocate it on the device that the module was loaded on",
            ));
        }
        if self.bytes < layout.bytes {
            return Err(Error::input(
                "workspace",
                format!("{} bytes", self.bytes),
                format!("at least {}", layout.bytes),
                "Ask the attention for its workspace_bytes",
            ));
        }
        check_address("workspace", self.address, ALIGNMENT)?;
        range_at("workspace", self.address, layout.bytes).map(drop)
    }
}
