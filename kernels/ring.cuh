// A stage of a ring in shared memory is free again when all warps that read it have arrived at its barrier: a lane of each
// for the others, after a __syncwarp. compute-sanitizer's racecheck does not follow that (a barrier orders what the lane
// that arrives has done, and no more, to it). With ARRIVALS=32 every lane arrives for itself, and it does; registers are
// not given from warp to warp then either, since what it puts into a kernel takes more of them.
#pragma once

#ifndef ARRIVALS
#define ARRIVALS 1
#endif
