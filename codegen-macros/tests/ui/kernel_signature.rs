use framestride_macros::kernel;

#[kernel(threads = 128)]
pub fn safe(data: u64) {}

#[kernel(threads = 128)]
pub unsafe fn by_reference(data: &[f32]) {}

#[kernel(threads = 128)]
pub unsafe fn returns(data: u64) -> u32 {
    0
}

#[kernel(threads = 128)]
pub unsafe fn generic<T>(data: u64) {}

#[kernel(threads = 128)]
pub unsafe extern "C" fn own_abi(data: u64) {}

#[kernel(threads = 128)]
pub unsafe fn unnamed((a, b): (u32, u32)) {}

fn main() {}
