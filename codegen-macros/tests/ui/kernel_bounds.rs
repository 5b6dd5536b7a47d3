use framestride_macros::kernel;

#[kernel(min_blocks = 1)]
pub unsafe fn no_threads(data: u64) {}

#[kernel(threads = 2048)]
pub unsafe fn too_many_threads(data: u64) {}

#[kernel(threads = 128, threads = 256)]
pub unsafe fn twice(data: u64) {}

#[kernel(threads = 128, registers = 64)]
pub unsafe fn unknown(data: u64) {}

#[kernel(threads = 128, shared_bytes = 300000)]
pub unsafe fn too_much_shared(data: u64) {}

fn main() {}
