// SPDX-License-Identifier: BSD-3-Clause
// Dependent launches: a kernel whose blocks may start before the kernel before it in the stream has ended (the launch attribute
// cudaLaunchAttributeProgrammaticStreamSerialization). Here it runs afterwards, but the race detector lets the kernel before
// write all of global memory until a thread, or one that it synchronises with, has executed griddepcontrol.wait. A thread
// that ends without it is an error in every build: then the order of kernels is lost for the next launch too.
// griddepcontrol.launch_dependents orders nothing.
#include "models.h"
#include "scheduler.h"

namespace simt {

void wait_for_kernel_before(Location) {
  const RuntimeScope scope;
  Fiber& fiber = running_fiber();
  fiber.waited_for_kernel_before = true;
  if (race::enabled) race::acquire_kernel_before(fiber.actor);
}

void has_arguments() {
  if (race::enabled) race::running = &running_fiber().actor;
}

}  // namespace simt
