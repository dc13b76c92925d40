// The kernels of upfirdn2d.cuh for bfloat16, in a file of their own for the compiler's time.

#include "upfirdn2d.cuh"

namespace fastgan {

template FirKernel fir_kernel_of<__nv_bfloat16>(const FirPlan&, bool);

}  // namespace fastgan
