//! Attentions: a module planned for a batch and a number of heads, and its calls.

use std::ffi::c_void;
use std::sync::Arc;

use framestride::{HeadTypes, Layer, Module, SparseAttention, Stream, Workspace};

use crate::argument;
use crate::call::framestride_call;
use crate::handle;
use crate::module::framestride_module;
use crate::status::{Failure, Result, framestride_status, guard};

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
        unsafe { argument::write("attention", attention, plan) }
    })
}

/// Bytes that the workspace of a call must have: about three times Q, or 1.5 times
/// where all heads multiply in 8 bits.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn framestride_workspace_bytes(
    attention: framestride_attention,
    bytes: *mut u64,
) -> framestride_status {
    guard(|| {
        let attention: Arc<SparseAttention> = handle::get(attention.handle)?;
        // SAFETY: the pointer is null, or that of a variable.
        unsafe { argument::write("bytes", bytes, || Ok(attention.workspace_bytes())) }
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
        // SAFETY: the caller's promise, as the header asks for it.
        let Prepared { attention, layer, types, workspace } = unsafe { prepare(attention, call)? };
        // SAFETY: likewise, and the stream is one of the context.
        unsafe { attention.forward(Stream::from_raw(stream), &layer, types, &workspace)? };
        Ok(())
    })
}

/// Launches what finds the types of the heads, and no attention: they and their errors go to
/// found_head_types and found_errors. head_types_from is FRAMESTRIDE_HEAD_TYPES_PROFILED. out and lse
/// are not looked at. All else is as for framestride_forward.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn framestride_profile(
    attention: framestride_attention,
    call: *const framestride_call,
    stream: *mut c_void,
) -> framestride_status {
    guard(|| {
        // SAFETY: the caller's promise, as the header asks for it.
        let Prepared { attention, layer, types, workspace } = unsafe { prepare(attention, call)? };
        if types != HeadTypes::Profiled {
            let allowed = "FRAMESTRIDE_HEAD_TYPES_PROFILED";
            return Err(Failure::argument("head_types_from", "other types", allowed, "Set it to 0"));
        }
        // SAFETY: likewise, and the stream is one of the context.
        unsafe { attention.profile(Stream::from_raw(stream), &layer, &workspace)? };
        Ok(())
    })
}

/// A call as the library takes it.
struct Prepared {
    attention: Arc<SparseAttention>,
    layer: Layer,
    types: HeadTypes,
    workspace: Workspace,
}

/// # Safety
/// The pointer is null, or that of a structure with its size. Its addresses are memory of the device,
/// which lives until the work is done.
unsafe fn prepare(attention: framestride_attention, call: *const framestride_call) -> Result<Prepared> {
    let attention: Arc<SparseAttention> = handle::get(attention.handle)?;
    // SAFETY: the caller's promise.
    let call = unsafe { argument::read_sized(call)? };
    let (layer, types) = call.layer(&attention)?;
    let address = call.workspace.expose_provenance() as u64;
    // SAFETY: the caller's promise.
    let workspace = unsafe { Workspace::borrow(attention.module().device(), address, call.workspace_bytes) };
    Ok(Prepared { attention, layer, types, workspace })
}

/// Frees an attention. By then none of its calls may still run.
#[unsafe(no_mangle)]
pub extern "C" fn framestride_attention_free(attention: framestride_attention) -> framestride_status {
    guard(|| handle::remove::<Arc<SparseAttention>>(attention.handle))
}
