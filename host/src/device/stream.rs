//! Streams and graphs. A stream of the caller is borrowed; a program that has none can make one.

use std::ffi::c_void;
use std::sync::Arc;

use cudarc::driver::sys;

use super::gpu::{Current, Gpu, check};
use crate::error::Result;

/// A CUDA stream that belongs to the caller. The emulator has no streams and ignores it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stream(usize);

impl Stream {
    /// The default stream of the context.
    pub const DEFAULT: Stream = Stream(0);

    /// Borrows a `CUstream` (or `cudaStream_t`, which is the same) of the device's context.
    ///
    /// # Safety
    /// The handle is a stream of the context that the work will be launched in. It lives as long as
    /// this value is used.
    #[must_use]
    pub unsafe fn from_raw(handle: *mut c_void) -> Stream {
        Stream(handle as usize)
    }

    pub(super) fn raw(self) -> sys::CUstream {
        self.0 as sys::CUstream
    }
}

/// A stream that this library made. Neither it nor the default stream waits for the other.
///
/// Dropping it waits for its work, so that no memory that outlives the stream is freed under a
/// kernel.
pub struct OwnedStream {
    gpu: Arc<Gpu>,
    stream: sys::CUstream,
}

impl OwnedStream {
    /// Makes a stream in the context of `gpu`.
    pub fn new(gpu: &Arc<Gpu>) -> Result<OwnedStream> {
        let _current = Current::push(gpu)?;
        let mut stream = std::ptr::null_mut();
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: `stream` is a live local and a context is current.
        check("cuStreamCreate", unsafe { sys::cuStreamCreate(&mut stream, flags) })?;
        Ok(OwnedStream { gpu: Arc::clone(gpu), stream })
    }

    /// The stream, to launch on while this value lives.
    #[must_use]
    pub fn borrow(&self) -> Stream {
        Stream(self.stream as usize)
    }

    /// Captures what `work` launches on this stream as a graph. Nothing of it runs here.
    pub fn capture(&self, work: impl FnOnce(Stream) -> Result<()>) -> Result<Graph> {
        let _current = Current::push(&self.gpu)?;
        // Other threads may go on allocating and waiting. Only this thread's calls must be such as
        // a capture allows.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is live, and it is no default stream.
        check("cuStreamBeginCapture", unsafe { sys::cuStreamBeginCapture_v2(self.stream, mode) })?;
        let worked = work(self.borrow());
        let mut captured = Captured(std::ptr::null_mut());
        // The capture is ended even where `work` failed, since a stream that is left capturing is
        // of no use.
        // SAFETY: the capture was begun on this thread; the graph is a live local's.
        let ended = check("cuStreamEndCapture", unsafe { sys::cuStreamEndCapture(self.stream, &mut captured.0) });
        worked?;
        ended?;
        let mut executable = std::ptr::null_mut();
        // SAFETY: the graph is live, and `executable` is a live local.
        check("cuGraphInstantiateWithFlags", unsafe {
            sys::cuGraphInstantiateWithFlags(&mut executable, captured.0, 0)
        })?;
        Ok(Graph { gpu: Arc::clone(&self.gpu), executable })
    }
}

impl Drop for OwnedStream {
    fn drop(&mut self) {
        if let Ok(_current) = Current::push(&self.gpu) {
            // SAFETY: created once, in `new`; whoever borrowed it launches nothing after this.
            unsafe {
                let _ = sys::cuStreamSynchronize(self.stream);
                let _ = sys::cuStreamDestroy_v2(self.stream);
            }
        }
    }
}

/// A captured graph, destroyed on drop while its context is current. It is null when the capture
/// failed.
struct Captured(sys::CUgraph);

impl Drop for Captured {
    fn drop(&mut self) {
        if !self.0.is_null() {
            // SAFETY: made once, by the end of a capture; executables made from it stay.
            let _ = unsafe { sys::cuGraphDestroy(self.0) };
        }
    }
}

/// An executable graph, destroyed on drop.
pub struct Graph {
    gpu: Arc<Gpu>,
    executable: sys::CUgraphExec,
}

impl Graph {
    /// Launches all of it, in stream order.
    ///
    /// # Safety
    /// What was captured may run now: the modules and memory that its launches use are live, and
    /// stay so until it is done.
    pub unsafe fn launch(&self, stream: Stream) -> Result<()> {
        let _current = Current::push(&self.gpu)?;
        // SAFETY: the graph is live; the rest is the caller's promise.
        check("cuGraphLaunch", unsafe { sys::cuGraphLaunch(self.executable, stream.raw()) })
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        if let Ok(_current) = Current::push(&self.gpu) {
            // SAFETY: made once, in `capture`; the driver frees one that still runs when it is
            // done.
            let _ = unsafe { sys::cuGraphExecDestroy(self.executable) };
        }
    }
}
