//! The few vector instructions that the program needs, for one vector width.
//!
//! Names of the methods say what is done to the lanes of 64 bits. All take register numbers, 0 to 15.

use iced_x86::IcedError;
use iced_x86::code_asm::registers::*;
use iced_x86::code_asm::{
    AsmMemoryOperand, AsmRegister32, AsmRegister64, AsmRegisterXmm, AsmRegisterYmm, CodeAssembler,
};

/// The vectors that the guest's code works with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vectors {
    /// 16 bytes; every processor with 64-bit mode has them.
    Sse2,
    /// 32 bytes. The upper halves are state that only XSAVE carries. The vCPU needs AVX2 and XSAVE in
    /// its CPUID and the XCR0 that [`crate::Start::xcrs`] gives.
    Avx2,
}

type Xmm = AsmRegisterXmm;
type Ymm = AsmRegisterYmm;

const X: [Xmm; 16] =
    [xmm0, xmm1, xmm2, xmm3, xmm4, xmm5, xmm6, xmm7, xmm8, xmm9, xmm10, xmm11, xmm12, xmm13, xmm14, xmm15];
const Y: [Ymm; 16] =
    [ymm0, ymm1, ymm2, ymm3, ymm4, ymm5, ymm6, ymm7, ymm8, ymm9, ymm10, ymm11, ymm12, ymm13, ymm14, ymm15];

/// One of the vector registers by its number.
#[derive(Clone, Copy)]
pub(super) struct Lane(pub(super) usize);

impl Lane {
    fn x(self) -> Xmm {
        X[self.0]
    }

    fn y(self) -> Ymm {
        Y[self.0]
    }
}

impl Vectors {
    /// Bytes in a vector.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        match self {
            Self::Sse2 => 16,
            Self::Avx2 => 32,
        }
    }

    /// What a mask of [`Vectors::mask`] is if all lanes agree.
    pub(super) const fn full_mask(self) -> u32 {
        match self {
            Self::Sse2 => 0xffff,
            Self::Avx2 => 0xffff_ffff,
        }
    }

    pub(super) fn load(
        self,
        a: &mut CodeAssembler,
        to: Lane,
        from: AsmMemoryOperand,
    ) -> Result<(), IcedError> {
        match self {
            Self::Sse2 => a.movdqa(to.x(), from),
            Self::Avx2 => a.vmovdqa(to.y(), from),
        }
    }

    pub(super) fn store(
        self,
        a: &mut CodeAssembler,
        to: AsmMemoryOperand,
        from: Lane,
    ) -> Result<(), IcedError> {
        match self {
            Self::Sse2 => a.movdqa(to, from.x()),
            Self::Avx2 => a.vmovdqa(to, from.y()),
        }
    }

    pub(super) fn add(self, a: &mut CodeAssembler, to: Lane, by: Lane) -> Result<(), IcedError> {
        match self {
            Self::Sse2 => a.paddq(to.x(), by.x()),
            Self::Avx2 => a.vpaddq(to.y(), to.y(), by.y()),
        }
    }

    /// Sets all bits where `to` and `with` agree, and clears them where they do not.
    pub(super) fn compare(self, a: &mut CodeAssembler, to: Lane, with: Lane) -> Result<(), IcedError> {
        match self {
            Self::Sse2 => a.pcmpeqd(to.x(), with.x()),
            Self::Avx2 => a.vpcmpeqd(to.y(), to.y(), with.y()),
        }
    }

    pub(super) fn and(self, a: &mut CodeAssembler, to: Lane, with: Lane) -> Result<(), IcedError> {
        match self {
            Self::Sse2 => a.pand(to.x(), with.x()),
            Self::Avx2 => a.vpand(to.y(), to.y(), with.y()),
        }
    }

    /// Gathers one bit of each byte.
    pub(super) fn mask(self, a: &mut CodeAssembler, to: AsmRegister32, from: Lane) -> Result<(), IcedError> {
        match self {
            Self::Sse2 => a.pmovmskb(to, from.x()),
            Self::Avx2 => a.vpmovmskb(to, from.y()),
        }
    }

    /// Takes the lowest lane.
    pub(super) fn lowest(
        self,
        a: &mut CodeAssembler,
        to: AsmRegister64,
        from: Lane,
    ) -> Result<(), IcedError> {
        match self {
            Self::Sse2 => a.movq(to, from.x()),
            Self::Avx2 => a.vmovq(to, from.x()),
        }
    }
}
