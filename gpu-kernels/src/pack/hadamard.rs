//! The Hadamard transform of a lane's eight elements of Q or K, before they are rounded to 8 bits.
//!
//! It is orthogonal, so the scores stay what they are. But an element that is much larger than its
//! neighbours, or a mean that some have, is spread over all eight. So is what rounding takes from
//! it.
//!
//! Element i of the result is the sum of all elements j. Each has the sign of [`SIGNS`], and one
//! more for each bit that i and j have in common. Without signs of its own a mean of all eight
//! would become one large element.

/// The factor of the result. It is one over the root of eight, and belongs to the scale of Q and K.
pub const FACTOR: f32 = core::f32::consts::FRAC_1_SQRT_2 / 2.0;

/// The signs of the elements before they are added.
const SIGNS: [f32; 8] = [1.0, 1.0, 1.0, -1.0, 1.0, 1.0, -1.0, 1.0];

/// The transform without its factor.
#[inline(always)]
pub fn transform(x: [f32; 8]) -> [f32; 8] {
    let mut x = x;
    let mut i = 0;
    while i < 8 {
        x[i] *= SIGNS[i];
        i += 1;
    }
    let mut distance = 1;
    while distance < 8 {
        let mut i = 0;
        while i < 8 {
            if i & distance == 0 {
                let (a, b) = (x[i], x[i + distance]);
                (x[i], x[i + distance]) = (a + b, a - b);
            }
            i += 1;
        }
        distance *= 2;
    }
    x
}
