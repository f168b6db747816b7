/** An error that the user can put right. Its message says in one or two plain sentences what is wrong and what to do. */
export class UserError extends Error {}

/** The reason with which a computation is aborted that the user has stopped, or begun anew: nobody needs to be told. (Work on
 *  a lost device ends with an AbortError, too.) */
export class Stopped extends Error {}
