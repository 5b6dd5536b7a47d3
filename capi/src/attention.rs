//! Attentions: a module planned for a batch and a number of heads, and its calls.

use std::ffi::c_void;
use std::sync::Arc;

use framestride::{Module, SparseAttention, Stream, Workspace};

use crate::call::framestride_call;
use crate::handle;
use crate::module::framestride_module;
use crate::status::{framestride_status, guard};

/// A handle of an attention: a module, planned for a batch and a number of heads.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct framestride_attention {
    /// A number for the library.
    pub handle: u64,
}

/// Plans calls of `batch` items of `heads` heads. They may be some of the model's heads, or more than
/// the spec has; but a norm over all heads needs exactly the spec's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn framestride_attention_new(
    module: framestride_module,
    batch: u32,
    heads: u32,
    attention: *mut framestride_attention,
) -> framestride_status {
    guard(|| {
        let module: Arc<Module> = handle::get(module.handle)?;
        let plan = || {
            let planned = Arc::new(SparseAttention::new(&module, batch, heads)?);
            Ok(framestride_attention { handle: handle::insert(planned) })
        };
        // SAFETY: the pointer is null, or that of a variable.
        unsafe { handle::write("attention", attention, plan) }
    })
}

/// Bytes that the workspace of a call must have, about three times Q.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn framestride_workspace_bytes(
    attention: framestride_attention,
    bytes: *mut u64,
) -> framestride_status {
    guard(|| {
        let attention: Arc<SparseAttention> = handle::get(attention.handle)?;
        // SAFETY: the pointer is null, or that of a variable.
        unsafe { handle::write("bytes", bytes, || Ok(attention.workspace_bytes())) }
    })
}

/// Launches one layer on `stream`, from Q, K and V to the output: norm, RoPE, profiling if it is asked
/// for, attention.
///
/// `stream` is a CUstream or cudaStream_t of the device's context; NULL is its default stream. The
/// emulator has none.
///
/// Everything is checked before the first launch. The call then launches kernels and returns: it
/// allocates nothing, copies nothing, loads nothing and waits for nothing. So it can be captured in a
/// CUDA graph. The handle, the memory and the stream live until the work is done.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn framestride_forward(
    attention: framestride_attention,
    call: *const framestride_call,
    stream: *mut c_void,
) -> framestride_status {
    guard(|| {
        let attention: Arc<SparseAttention> = handle::get(attention.handle)?;
        // SAFETY: the pointer is null, or that of a structure with its size.
        let call = unsafe { handle::read_sized(call)? };
        let (layer, types) = call.layer(&attention)?;
        let (address, bytes) = (call.workspace.expose_provenance() as u64, call.workspace_bytes);
        // SAFETY: the caller promises that all addresses are memory of the device, which lives until
        // the work is done, and that the stream is one of its context.
        unsafe {
            let workspace = Workspace::borrow(attention.module().device(), address, bytes);
            Ok(attention.forward(Stream::from_raw(stream), &layer, types, &workspace)?)
        }
    })
}

/// Frees an attention. By then none of its calls may still run.
#[unsafe(no_mangle)]
pub extern "C" fn framestride_attention_free(attention: framestride_attention) -> framestride_status {
    guard(|| handle::remove::<Arc<SparseAttention>>(attention.handle))
}
