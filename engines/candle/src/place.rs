//! Where tensors lie: what a launch must know of their storages, on the CPU and on a GPU.

use candle_core::backend::BackendDevice;
use candle_core::{CpuStorage, Device, Storage};
use framestride::Stream;

/// A device of candle's.
pub(crate) trait Place: BackendDevice {
    /// Whether kernels that were loaded on `device` can use memory of this one.
    fn is_of(&self, device: &Device) -> bool;

    /// The storage of a tensor, if it is memory of this device.
    fn own<'a>(&self, storage: &'a Storage) -> Option<&'a Self::Storage>;

    /// The storage as tensors have it.
    fn storage(storage: Self::Storage) -> Storage;

    /// The stream on which candle launches.
    fn stream(&self) -> Stream;

    /// Address and number of elements of a storage that is read.
    ///
    /// What the stream launches after this waits for what other streams write there, and their next
    /// writing waits for what the stream has launched before this. So it is called before a launch
    /// and after it.
    fn read(&self, storage: &Self::Storage) -> (u64, usize);

    /// Address of a storage that is written, likewise.
    fn written(&self, storage: &mut Self::Storage) -> u64;
}

/// What `$value` says of the elements `$elements` of a storage. Other types than these have been
/// refused before, so for them it is zero.
macro_rules! of_elements {
    ($kind:ident, $storage:expr, $elements:ident => $value:expr) => {
        match $storage {
            $kind::BF16($elements) => $value,
            $kind::F16($elements) => $value,
            $kind::F32($elements) => $value,
            $kind::U32($elements) => $value,
            $kind::U8($elements) => $value,
            _ => Default::default(),
        }
    };
}

impl Place for candle_core::cpu_backend::CpuDevice {
    fn is_of(&self, device: &Device) -> bool {
        device.is_cpu()
    }

    fn own<'a>(&self, storage: &'a Storage) -> Option<&'a CpuStorage> {
        if let Storage::Cpu(storage) = storage { Some(storage) } else { None }
    }

    fn storage(storage: CpuStorage) -> Storage {
        Storage::Cpu(storage)
    }

    fn stream(&self) -> Stream {
        Stream::DEFAULT
    }

    fn read(&self, storage: &CpuStorage) -> (u64, usize) {
        of_elements!(CpuStorage, storage, elements => (elements.as_ptr() as u64, elements.len()))
    }

    fn written(&self, storage: &mut CpuStorage) -> u64 {
        of_elements!(CpuStorage, storage, elements => elements.as_mut_ptr() as u64)
    }
}

#[cfg(feature = "cuda")]
mod cuda {
    use candle_core::cuda::CudaStorageSlice;
    use candle_core::cuda::cudarc::driver::{CudaStream, DevicePtr, DevicePtrMut};
    use candle_core::{CudaDevice, CudaStorage, Device, Storage};
    use framestride::Stream;

    use super::Place;

    /// Whether both have the same memory. Their streams may differ.
    fn share_context(a: &CudaDevice, b: &CudaDevice) -> bool {
        a.cuda_stream().context().cu_ctx() == b.cuda_stream().context().cu_ctx()
    }

    /// Lets two streams wait for what each other has launched.
    ///
    /// cudarc orders them by the events of a slice, but only where both of their devices have made
    /// streams. The stream of `Device::new_cuda` is that of the thread, which counts as none.
    fn order(a: &CudaStream, b: &CudaStream) {
        if a != b {
            // The next call of candle tells of a failure.
            a.context().record_err(a.join(b));
            b.context().record_err(b.join(a));
        }
    }

    impl Place for CudaDevice {
        fn is_of(&self, device: &Device) -> bool {
            matches!(device, Device::Cuda(device) if share_context(device, self))
        }

        fn own<'a>(&self, storage: &'a Storage) -> Option<&'a CudaStorage> {
            match storage {
                Storage::Cuda(storage) if share_context(&storage.device, self) => Some(storage),
                _ => None,
            }
        }

        fn storage(storage: CudaStorage) -> Storage {
            Storage::Cuda(storage)
        }

        fn stream(&self) -> Stream {
            // SAFETY: the stream is one of the context that the kernels are loaded in (`is_of`), and
            // the device keeps it.
            unsafe { Stream::from_raw(self.cuda_stream().cu_stream().cast()) }
        }

        fn read(&self, storage: &CudaStorage) -> (u64, usize) {
            let stream = self.cuda_stream();
            of_elements!(CudaStorageSlice, &storage.slice, slice => {
                order(&stream, slice.stream());
                (slice.device_ptr(&stream).0, slice.len())
            })
        }

        fn written(&self, storage: &mut CudaStorage) -> u64 {
            let stream = self.cuda_stream();
            of_elements!(CudaStorageSlice, &mut storage.slice, slice => slice.device_ptr_mut(&stream).0)
        }
    }
}
